"""Checkpoints that stand elsewhere: on the Hub, in a bucket, on a web server (docs/remote.md).

A remote source becomes a local folder of sparse files (mirror.py) that fills as it is read (reader.py); an output is
written here and sent shard by shard (target.py). A store (store.py) knows how to list, get and put files.
"""
