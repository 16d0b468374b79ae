"""The folder of a bundle: four plain files, and a manifest of their sizes and hashes with a fingerprint."""

import hashlib
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dynanet.core.errors import BundleError
from dynanet.core.files import set_aside
from dynanet.export.config import CONFIG, FORMAT
from dynanet.export.strict import check_keys, dump, parse, short
from dynanet.export.weights import WEIGHTS

MANIFEST = "manifest.json"
README = "README.md"
NAMES = {WEIGHTS, CONFIG, MANIFEST, README}
MOST_TEXT_BYTES = 1_000_000


def check_place(folder: Path) -> None:
    """Check that a bundle may be written here: to a new or empty folder, or over an older bundle.

    Raises:
        BundleError: the folder is a link or holds other files.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise BundleError(f"{folder} is a link, or not a folder; give a new folder or an older bundle")
    if {entry.name for entry in folder.iterdir()} not in (set(), NAMES):
        raise BundleError(f"{folder} is neither empty nor a bundle, and was not changed; give a new folder")


def check_names(folder: Path) -> None:
    """Check that the folder holds the four files of a bundle and no others.

    Raises:
        BundleError: it does not, or it is a link.
    """
    if folder.is_symlink() or not folder.is_dir():
        left = set_aside(folder)
        hint = f"; a save was cut off and left the bundle in {left.name}: rename it" if left else ""
        found = "is a link, or not a folder" if os.path.lexists(folder) else "does not exist"
        raise BundleError(f"{folder} {found}; expected the folder of a bundle{hint}")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name not in NAMES:
                raise BundleError(f"{folder} holds {short(entry.name)}; a bundle holds {', '.join(sorted(NAMES))} only")
    for name in sorted(NAMES):
        if not os.path.lexists(folder / name):
            raise BundleError(f"{folder} has no {name}; it is not a bundle, or not all of one")


def open_plain(folder: Path, name: str) -> BinaryIO:
    """Open a plain file with a single name; a link could lead out of the folder.

    Raises:
        BundleError: a link, or another kind of file.
    """
    path = folder / name
    before = os.lstat(path)
    if not stat.S_ISREG(before.st_mode) or before.st_nlink != 1:
        raise BundleError(f"{name} is a link or not a file; expected a plain file with a single name: copy the bundle")
    file = open(path, "rb")
    if not os.path.samestat(before, os.fstat(file.fileno())):
        file.close()
        raise BundleError(f"{name} was replaced while it was read; load the bundle again")
    return file


def read_text(folder: Path, name: str) -> bytes:
    """The bytes of a file of at most `MOST_TEXT_BYTES`.

    Raises:
        BundleError: it is longer, or not a plain file.
    """
    with open_plain(folder, name) as file:
        text = file.read(MOST_TEXT_BYTES + 1)
    if len(text) > MOST_TEXT_BYTES:
        raise BundleError(f"{name} is longer than {MOST_TEXT_BYTES:,} bytes; expected the file of a bundle")
    return text


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a fingerprint of its other entries, and so of every byte of the bundle."""
    rest = {key: value for key, value in manifest.items() if key != "fingerprint"}
    return rest | {"fingerprint": hashlib.sha256(dump(rest)).hexdigest()}


def sums(content: bytes) -> dict[str, Any]:
    """The size and hash of a file, as the manifest lists them."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def check_sums(name: str, content: bytes, manifest: Mapping[str, Any]) -> None:
    """Check a file against the size and hash in the manifest.

    Raises:
        BundleError: it differs.
    """
    if sums(content) != manifest["files"][name]:
        raise BundleError(f"{name} does not match {MANIFEST} in size or sha256; fetch the bundle again")


def parse_manifest(text: bytes) -> dict[str, Any]:
    """Parse and check the manifest of an untrusted file.

    Raises:
        BundleError: it is not a manifest, or does not match its fingerprint.
    """
    manifest = parse(text, MANIFEST)
    if manifest.get("format") != FORMAT:
        raise BundleError(
            f"{MANIFEST} has format {short(manifest.get('format'))}; this dynanet reads {FORMAT}: update it"
        )
    check_keys(manifest, {"format", "dynanet", "files", "macs", "tensors", "fingerprint"}, MANIFEST)
    check_keys(manifest["files"], NAMES - {MANIFEST}, f"{MANIFEST}: files")
    check_keys(manifest["macs"], {"mean", "worst"}, f"{MANIFEST}: macs")
    for kind, macs in manifest["macs"].items():
        check_macs(kind, macs)
    if not isinstance(manifest["tensors"], dict):
        raise BundleError(f"{MANIFEST}: tensors is {short(manifest['tensors'])}; expected an object")
    try:
        same = dump(seal(manifest)) == text
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise BundleError(f"{MANIFEST} does not match its own fingerprint; fetch the bundle again")
    return manifest


def check_macs(kind: str, macs: Any) -> None:
    """Check a number of MACs; None is allowed.

    Raises:
        BundleError: not a finite number of at least 0.
    """
    if macs is None:
        return
    if not isinstance(macs, int | float) or isinstance(macs, bool) or not 0 <= macs < math.inf:
        raise BundleError(f"{kind} MACs are {short(macs)}; expected a finite number of at least 0, or none")
