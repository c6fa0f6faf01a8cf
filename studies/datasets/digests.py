"""Digests of downloads, by which they are known to be whole before they are opened."""

import hashlib


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
