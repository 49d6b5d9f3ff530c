"""What tools/make_shards.py does: sources of images, tar shards of them, manifests, and FFCV files of the shards."""
