"""Fails if a group of tests that this repository has was skipped or did not run: a green run must have run them.

Usage: check_groups.py REPORT, the junit file of a pytest run. tests/conftest.py writes each test's groups into it.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

GROUPS = ("browser", "distributed", "ffcv", "machines", "slurm")


def main(report: Path, tests: Path) -> int:
    """Print each group and return 1 if one was skipped or did not run."""
    sources = [path.read_text() for path in tests.rglob("test_*.py")]
    outcomes: dict[str, list[str | None]] = defaultdict(list)  # of each test in a group: why it was skipped, or None
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        for group in case.findall("properties/property[@name='group']"):
            outcomes[group.attrib["value"]].append(None if skipped is None else skipped.attrib["message"])

    failed = False
    for group in GROUPS:
        exists = any(re.search(rf"\bmark\.{group}\b", source) for source in sources)
        reasons = sorted({reason for reason in outcomes[group] if reason is not None})
        ran = outcomes[group].count(None)
        failed |= bool(reasons) or (exists and not ran)
        print(f"ci: {group}: {ran} ran" + "".join(f"; skipped: {reason}" for reason in reasons))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(__file__).parents[1] / "tests"))
