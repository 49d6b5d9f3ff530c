"""Claims about mistakes on the command line and in configurations: each is explained in one line."""

from pathlib import Path

import pytest
from _mistakes import check
from _options import GROUPS, register

from alignscale.choices import ConfigError

WHERE_NET = "expected one of net.width, net.activation, net.norm, net.parameterisation, net.gain, net.blocks"
GROUPS_AND_OPTIONS = "expected one of rule, net, data, optim, loss, schedule, engine, frozen"
# A command line, and what is said about it.
MISTAKES = [
    # misspelt, or of another choice
    ("net.widht=3", f"net.widht=3: net=conv3 has no option widht; {WHERE_NET}, net.strides; did you mean net.width?"),
    ("epoch=3", f"epoch=3: a run has no option epoch; {GROUPS_AND_OPTIONS}", "did you mean epochs?"),
    ("optim.momentm=0.9", "optim=sgd has no option momentm", "optim.momentum", "did you mean optim.momentum?"),
    ("momentm=0.9", "did you mean optim.momentum?"),
    ("net.lr=3", "net=conv3 has no option lr", "did you mean optim.lr?"),
    ("nets=mlp", "nets=mlp: a run has no option nets", "did you mean net?"),
    ("net.depth=2 net=conv3", f"net.depth=2: net=conv3 has no option depth; {WHERE_NET}", "depth is one of net=mlp"),
    ("rule.magnitude=3", "rule=align_ada has no option magnitude; magnitude is one of rule=sign_symmetric"),
    ("log={progres:false}", "log has no option progres", "did you mean log.progress?"),
    ("compare.widths=[3]", "a run has no option compare", "compare is one of launch/compare.py"),
    ("experiment=demo", "experiment/demo.yaml: compare: a run has no option compare"),
    ("hydra.foo=1", "hydra has no option foo"),
    # unknown choices
    ("net=resnet", "net=resnet: expected one of conv3, conv7, imagenet_conv7, mlp, rnn"),
    ("net=MLP", "did you mean mlp?"),
    ("rule=alignada", "rule=alignada: expected one of align_ada, ", "did you mean align_ada?"),
    ("loss=l1", "loss=l1: expected one of cross_entropy, mse"),
    ("optim=lion", "optim=lion: expected one of adam, adamw, sgd"),
    ("schedule=poly", "schedule=poly: expected one of constant, cosine, step"),
    ("data=svhn", "data=svhn: expected one of add, cifar10, cifar100, digits"),
    ("experiment=nothing", "experiment=nothing: expected one of add, demo"),
    ("net=null", "net=null: expected one of conv3, "),
    ("net.name=mlp", "net.name=mlp: expected net=mlp"),
    ("hydra/launcher=foo", "hydra/launcher=foo: expected one of basic, "),
    ("--config-name foo", "--config-name=foo: expected one of compare, train"),
    # values
    ("net.width=abc", "net.width=abc: expected int"),
    ("epochs=1.5", "epochs=1.5: expected int"),
    ("optim.lr=abc", "optim.lr=abc: expected float"),
    ("log.progress=maybe", "log.progress=maybe: expected bool (true or false)"),
    ("net.strides=3", "net.strides=3: expected list of int, as [1,2]"),
    ("net.strides=[1,a]", "net.strides=[1,a]: expected list of int, as [1,2]"),
    ("net.strides=[1,[2]]", "net.strides=[1,[2]]: expected list of int, as [1,2], found [2]"),
    ("evaluation.splits=test", "evaluation.splits=test: expected list of str, as [a,b]"),
    ("log=none", "log=none: expected a value for one of its options, log.every_steps, log.progress"),
    ("net.width.x=3", "net.width has no options of its own; expected net.width=<int>"),
    ("epochs=null", "epochs=null: expected int"),
    ("epochs=???", "epochs=???: expected int, found none"),
    ("epochs=${epoch}", "epochs=${epoch}: Interpolation key 'epoch' not found"),
    (f"seed={2**63}", "expected int of at most 64 bits"),
    ("net.width=1,2", "net.width=1,2: expected one value, found several; add --multirun for a run with each"),
    ("net.strides=1,2", "net.strides=1,2: expected one value, found several; write a list of int, as [1,2], or add"),
    ("--multirun rule=glob(align*)", "rule=glob(align*): expected values as 1,2,3 or range(1,4)"),
    # the form
    ("net.width", "net.width: expected option=value"),
    ("=3", "=3: expected option=value"),
    ("net.width=[1,", "net.width=[1,: cannot be read; expected a list as net.width=[1,2], without spaces"),
    ("run.root=~/x", "run.root=~/x: cannot be read; expected the value in two pairs of quotes: 'run.root=\"~/x\"'"),
    ("+foo=1", "+foo=1: no such option"),
    ("++net.width=3", "++net.width=3: expected net.width=3, without +"),
    ("~net", "~net: expected option=value; no option can be deleted"),
    ("net@x=mlp", "net@x=mlp: expected net=<choice>, without @x"),
    ("--epochs=3", "--epochs=3: expected options as epochs=3, without dashes"),
    ("net=mlp --multirun seed=1,2", "seed=1,2: expected flags as --multirun before or after all options"),
    ("--multirun --cfg job", "--multirun --cfg: expected one of them"),
    ("--config-dir nowhere", "--config-dir=nowhere: expected a folder, found none"),
    # words of a shell that took braces for its own
    (
        "data=webdataset data.urls=a0.tar data.urls=a1.tar",
        "data.urls=a0.tar data.urls=a1.tar: expected data.urls once",
    ),
    ("seed=0 seed=1 seed=2", "seed=0 seed=1: expected seed once", "several values as seed=a,b"),
    (
        "experiment=configs/experiment/demo.yaml",
        "experiment=configs/experiment/demo.yaml: expected one of",
        "mean demo?",
    ),
    ("data=/data/digits", "data=/data/digits: expected one of", "a folder is data.root="),
    # one of several jobs
    ("--multirun net=mlp,conv3 net.depth=2", "net.depth=2: net=conv3 has no option depth"),
    ("--multirun net.width=4,-4", "net.width=-4: expected a whole number of at least 1"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[0])
def test_a_mistake_on_the_command_line_is_explained(mistake: tuple[str, ...]) -> None:
    register()
    with pytest.raises(ConfigError) as found:
        check("train", mistake[0].split())
    (message,) = str(found.value).splitlines()
    assert [fragment for fragment in mistake[1:] if fragment not in message] == [], message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {momentm: 3}", "experiment/mine.yaml: optim.momentm: optim=sgd has no option momentm"),
        ("optim: {lr: abc}", "experiment/mine.yaml: optim.lr: expected float"),
        ("defaults: [override /net: resnet]", "net=resnet, which a configuration file asks for: expected one of conv3"),
        ("optim: {", "mine.yaml"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(f"# @package _global_\n{text}\n")
    register()
    with pytest.raises(ConfigError) as found:
        check("train", ["experiment=mine", "optim.lr=3", "--config-dir", str(tmp_path)])
    assert message in str(found.value)


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_composes(group: str) -> None:
    register()
    for choice in GROUPS[group]:
        check("train", [f"{group}={choice}"])
