"""The hostile corpus: what can be wrong with a bundle, by accident or on purpose, one small edit of a good one each.

Where `reseal` is called, the attacker has made manifest, hashes and fingerprint fit, so a later check has to see it.
"""

import json
import os
import pickle
import reprlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from tests.export import edits
from tests.export.edits import CANARY, CONFIG, MANIFEST, NAMES, README, WEIGHTS, then_reseal


class Case(NamedTuple):
    name: str
    says: str  # a part of the error's message
    edit: Callable[[Path], object]  # of the folder of a good bundle


def cases() -> Iterator[Case]:
    for group in (damaged, strange_files, disguised, headers, tensors, configs, manifests):
        yield from group()


def damaged() -> Iterator[Case]:
    for name in NAMES:
        for k in range(8):
            yield Case(f"{name} cut at {k}/8", name, lambda at, n=name, k=k: edits.cut(at / n, k / 8))
        yield Case(f"{name} one byte longer", name, lambda at, n=name: edits.append(at / n, b"\0"))
    for k in range(16):
        yield Case(f"cut at {k}/16, resealed", WEIGHTS, then_reseal(lambda at, k=k: edits.cut(at / WEIGHTS, k / 16)))
    yield Case(
        "one byte longer, resealed", "bytes, expected", then_reseal(lambda at: edits.append(at / WEIGHTS, b"\0"))
    )
    yield Case("one bit of the weights", "sha256", lambda at: edits.flip(at / WEIGHTS, -5))
    yield Case("one bit of the card", "sha256", lambda at: edits.flip(at / README, 9))


def strange_files() -> Iterator[Case]:
    for name in NAMES:
        yield Case(f"{name} missing", f"no {name}", lambda at, n=name: (at / n).unlink())
        yield Case(f"{name} renamed", "holds", lambda at, n=name: (at / n).rename(at / f"{n}.bak"))
        yield Case(f"{name} a symlink", "link", lambda at, n=name: edits.outside(at, n, os.symlink))
        yield Case(f"{name} a hard link", "link", lambda at, n=name: edits.outside(at, n, os.link))
        yield Case(f"{name} a folder", "not a file", lambda at, n=name: edits.instead(at / n, Path.mkdir))
        yield Case(f"{name} a pipe", "not a file", lambda at, n=name: edits.instead(at / n, os.mkfifo))
        yield Case(
            f"{name} a dangling link", "link", lambda at, n=name: edits.instead(at / n, lambda p: p.symlink_to("x"))
        )
    yield Case(
        "a link to nowhere endless", "link", lambda at: edits.instead(at / CONFIG, lambda p: p.symlink_to(CONFIG))
    )
    yield Case("a file too many", "holds", lambda at: (at / "model.py").write_text("import os"))
    yield Case("a hidden file too many", "holds", lambda at: (at / ".hidden").touch())
    yield Case("a name of two lines", "holds", lambda at: (at / "a\nb").touch())
    yield Case("an empty folder", "no README", lambda at: [(at / n).unlink() for n in NAMES])
    yield Case("no folder", "folder", shutil.rmtree)
    yield Case("a file for a folder", "folder", lambda at: (shutil.rmtree(at), at.touch()))
    yield Case("a link for a folder", "link", lambda at: (at.rename(at.with_name("real")), at.symlink_to("real")))
    yield Case("a zip of the folder", "folder", edits.zip_all)
    yield Case(
        "another model's weights", "sha256", lambda at: edits.save(at, edits.changed(at, thresholds=torch.ones(1)))
    )


def disguised() -> Iterator[Case]:
    for protocol in range(6):
        yield Case(
            f"a pickle, protocol {protocol}",
            WEIGHTS,
            then_reseal(lambda at, p=protocol: (at / WEIGHTS).write_bytes(pickle.dumps(edits.Evil(at), p))),
        )
    for name in (CONFIG, README):
        yield Case(f"a pickle as {name}", name, lambda at, n=name: (at / n).write_bytes(pickle.dumps(edits.Evil(at))))
    yield Case(
        "a pickle as manifest", MANIFEST, lambda at: (at / MANIFEST).write_bytes(pickle.dumps(edits.Evil(at), 0))
    )
    yield Case("a torch file", WEIGHTS, then_reseal(lambda at: torch.save({"a": edits.Evil(at)}, at / WEIGHTS)))
    yield Case("an old torch file", WEIGHTS, then_reseal(edits.old_torch_file))
    yield Case("a pickle after a header of its length", "damaged", then_reseal(edits.pickle_in_header))
    yield Case("a zip bomb", WEIGHTS, then_reseal(edits.zip_bomb))
    yield Case("code as config", "damaged", then_reseal(lambda at: (at / CONFIG).write_text("__import__('os')")))
    yield Case("yaml as config", "damaged", then_reseal(lambda at: (at / CONFIG).write_text("!!python/name:os")))


def headers() -> Iterator[Case]:
    for length in (0, 1, 7, 2**20, 2**31, 2**32, 2**63, 2**64 - 1):
        yield Case(f"a header of {length} bytes", "header", then_reseal(lambda at, n=length: edits.set_length(at, n)))
    yield Case("a header of 100 MB", "header", then_reseal(edits.long_header))
    for what, says, edit in [
        ("a name twice", "twice", lambda text: text.replace(b'"thresholds"', b'"more.0.bias"')),
        ("two lines in a name", "manifest", lambda text: text.replace(b"thresholds", b"thre\\nholds")),
        ("not UTF-8", "damaged", lambda text: text.replace(b"thresholds", b"thr\xff\xfeholds")),
        ("a dtype of the same size", "F32", lambda text: text.replace(b'"F32"', b'"I32"', 1)),
        ("a dtype unknown", "F33", lambda text: text.replace(b'"F32"', b'"F33"', 1)),
        ("a dtype of the wrong kind", "expected dtype", lambda text: text.replace(b'"F32"', b"[[1]]", 1)),
        ("a key too many", "exactly", lambda text: text.replace(b'{"dtype"', b'{"code":"os","dtype"', 1)),
        ("a key missing", "exactly", lambda text: text.replace(b'"dtype":"F32",', b"", 1)),
        ("a float in a shape", "shape", lambda text: text.replace(b'"shape":[1]', b'"shape":[1.0]')),
        ("a shape of text", "shape", lambda text: text.replace(b'"shape":[1]', b'"shape":"1"')),
        ("a number in a shape of 400 digits", "lists", lambda text: text.replace(b"[1]", b"[1" + b"0" * 400 + b"]")),
        ("a number of 9000 digits", "damaged", lambda text: text.replace(b"[1]", b"[1" + b"0" * 9000 + b"]")),
        ("a shape that overflows", "has", lambda text: text.replace(b"[4,4]", b"[9223372036854775807,4]")),
        ("a negative shape", "has", lambda text: text.replace(b"[4,4]", b"[-4,-4]")),
        ("a shape nested deep", "damaged", lambda text: text.replace(b"[4,4]", b"[" * 200_000 + b"]" * 200_000)),
        ("a shape nested", "shape", lambda text: text.replace(b"[4,4]", b"[" * 200 + b"]" * 200)),
        ("offsets that leave a hole", "damaged", lambda text: edits.offsets(text, lambda a, b: (a, b + 8 * (a > 90)))),
        ("offsets that overlap", "damaged", lambda text: edits.offsets(text, lambda a, b: (0, b - a))),
        ("offsets the wrong way", "damaged", lambda text: edits.offsets(text, lambda a, b: (b, a))),
        ("negative offsets", "damaged", lambda text: edits.offsets(text, lambda a, b: (-b, -a))),
        ("offsets far out", "damaged", lambda text: edits.offsets(text, lambda a, b: (a + 2**60, b + 2**60))),
        ("offsets that overflow", "damaged", lambda text: edits.offsets(text, lambda a, b: (a + 2**65, b + 2**65))),
        (
            "offsets nested deep",
            "damaged",
            lambda text: edits.offsets(text, lambda a, b: json.loads("[" * 300 + "]" * 300)),
        ),
        ("metadata", "exactly", lambda text: b'{"__metadata__":{"format":"pt"},' + text[1:]),
        ("an array", "object", lambda text: b"[" + text + b"]"),
        ("NaN", "NaN", lambda text: text.replace(b"[1]", b"[NaN]")),
        ("9000 tensors", "nothing", lambda text: edits.many_tensors(9_000)),
    ]:
        yield Case(f"a header with {what}", says, then_reseal(lambda at, edit=edit: edits.edit_header(at, edit)))


def tensors() -> Iterator[Case]:
    places = [
        (name, value) for name in ("more.0.weight", "heads.1.bias") for value in (torch.nan, torch.inf, -torch.inf)
    ]
    for name, value in [*places, ("thresholds", torch.nan), ("first.1.running_var", -1.0)]:
        says = f"{name} holds {value}"
        yield Case(says, says, lambda at, n=name, v=value: edits.save(at, edits.poisoned(at, n, v), sealed=True))
    for what, says, change in [
        ("a tensor too many", "extra", {"extra": torch.ones(1)}),
        ("a tensor missing", "nothing", {"thresholds": None}),
        ("a shape of as many numbers", "[2, 8]", {"more.0.weight": torch.ones(2, 8)}),
        ("a shape turned", "[4, 3]", {"heads.0.weight": torch.ones(4, 3)}),
        ("halves", "F16", {"more.0.weight": torch.ones(4, 4, dtype=torch.float16)}),
        ("doubles", "F64", {"more.0.weight": torch.ones(4, 4, dtype=torch.float64)}),
        ("no numbers", "[0]", {"thresholds": torch.ones(0)}),
        ("a scalar", "[]", {"thresholds": torch.ones(())}),
        ("a larger model", "[9, 2, 3, 3]", {"first.0.weight": torch.ones(9, 2, 3, 3)}),
    ]:
        yield Case(what, says, lambda at, c=change: edits.save(at, edits.changed(at, **c), sealed=True))
        unlisted = then_reseal(lambda at, c=change: edits.save(at, edits.changed(at, **c)))
        yield Case(f"{what}, not in the manifest", "manifest.json lists", unlisted)
    yield Case("4000 layers, cut short", "bytes, expected", edits.many_layers)
    yield Case("names exchanged", "more.0", lambda at: edits.save(at, edits.exchanged(at), sealed=True))


def configs() -> Iterator[Case]:
    long, deep = ["a"] * 20_000, json.loads("[" * 50 + "]" * 50)
    for key, value, says in [
        ("format", 2, "update"),
        ("format", "1", "update"),
        ("format", None, "update"),
        ("architecture", "os.system", "os.system"),
        ("architecture", "__import__", "expected one of tiny"),
        ("architecture", "../tiny", "expected one of tiny"),
        ("architecture", "tiny\n\nall is well", "expected one of tiny"),
        ("architecture", ["tiny"], "expected one of tiny"),
        ("architecture", None, "expected one of tiny"),
        ("architecture", {"tiny": 1}, "expected one of tiny"),
        ("arguments", None, "arguments is None"),
        ("arguments", [3], "arguments is"),
        ("arguments", {}, "num_classes"),
        ("arguments", {"num_classes": 3, "callback": "os.system"}, "callback"),
        ("arguments", {"num_classes": 3, "self": 1}, "self"),
        ("arguments", {"num_classes": 3, "tags": {"__class__": "Evil"}}, "tags"),
        ("arguments", {"num_classes": 3, "tags": long}, "tags"),
        ("arguments", {"num_classes": 3, "tags": deep}, "tags"),
        ("arguments", {"num_classes": 3, "tags": "a" * 5_000}, "tags"),
        ("arguments", {"num_classes": 3, "tags": "\x1b[2J"}, "tags"),
        ("arguments", {"num_classes": 10**7}, "1,000,000"),
        ("arguments", {"num_classes": -(10**7)}, "1,000,000"),
        ("arguments", {"num_classes": 10**400}, "1,000,000"),
        ("arguments", {"num_classes": 3, "width": 10**6}, "belongs to another"),
        ("arguments", {"num_classes": 3, "width": 10**6, "depth": 9}, "belongs to another"),
        ("arguments", {"num_classes": 3, "depth": 10**6}, "far larger"),
        ("arguments", {"num_classes": 3, "depth": 0}, "belongs to another"),
        ("arguments", {"num_classes": 3, "width": 0}, CONFIG),
        ("arguments", {"num_classes": 3, "width": -3}, "cannot build a model with these"),
        ("arguments", {"num_classes": 3, "width": 3.5}, "cannot build a model with these"),
        ("arguments", {"num_classes": 3, "width": "3"}, "cannot build a model with these"),
        ("arguments", {"num_classes": 3, "width": None}, "cannot build a model with these"),
        ("arguments", {"num_classes": 3, "width": [3]}, "cannot build a model with these"),
        ("arguments", {"num_classes": None}, "3 classes are named"),
        ("arguments", {"num_classes": 4}, "3 classes are named"),
        ("limits", [1], "limits is"),
        ("limits", {"": 0}, "from 1 on"),
        ("limits", {"": -1}, "from 1 on"),
        ("limits", {"": True}, "from 1 on"),
        ("limits", {"": "1"}, "from 1 on"),
        ("limits", {"": 10**9}, "from 1 on"),
        ("limits", {"more": 1}, "no steps"),
        ("limits", {"a.b": 1}, "no steps"),
        ("active", [1], "active is"),
        ("active", {"": 0}, "from 0 on"),
        ("active", {"": []}, "from 0 on"),
        ("active", {"": [0, -1]}, "from 0 on"),
        ("active", {"": [True]}, "from 0 on"),
        ("active", {"": [10**9]}, "from 0 on"),
        ("active", {"": [0, 1]}, "none to switch off"),
        ("active", {"a.b": [0]}, "none to switch off"),
        ("classes", ["a", "b"], "2 classes are named"),
        ("classes", ["a", "b", 3], "names"),
        ("classes", ["a", "b", ["c"]], "names"),
        ("classes", "abc", "names"),
        ("classes", long, "10,000"),
        ("classes", ["a", "b", "c" * 2_000], "printable"),
        ("classes", ["a", "b", "c\n"], "printable"),
        ("input", [], "exactly"),
        ("input", {}, "exactly"),
        ("input", {"channels": 2, "size": None, "mean": None, "std": None, "url": "x"}, "exactly"),
        ("input", {"channels": 3, "size": None, "mean": None, "std": None}, "3 channels"),
        ("input", {"channels": 0, "size": None, "mean": None, "std": None}, "channels"),
        ("input", {"channels": 2, "size": [8], "mean": None, "std": None}, "size"),
        ("input", {"channels": 2, "size": [8, 10**7], "mean": None, "std": None}, "size"),
        ("input", {"channels": 2, "size": [], "mean": None, "std": None}, "size"),
        ("input", {"channels": 2, "size": None, "mean": [0.5], "std": None}, "mean"),
        ("input", {"channels": 2, "size": None, "mean": 0.5, "std": None}, "mean"),
        ("input", {"channels": 2, "size": None, "mean": None, "std": [1, 0]}, "std"),
        ("input", {"channels": 2, "size": None, "mean": None, "std": [1, "1"]}, "std"),
        ("code", "import os", "exactly"),
    ]:
        name = f"config: {key} {reprlib.repr(value)}"
        yield Case(name, says, then_reseal(lambda at, k=key, v=value: edits.edit_json(at / CONFIG, {k: v})))
    yield Case(
        "config: a key missing", "exactly", then_reseal(lambda at: edits.edit_json(at / CONFIG, {"limits": ...}))
    )
    for what, says, edit in [
        ("a key twice", "twice", lambda text: text.replace(b'"limits"', b'"format"')),
        ("a nested key twice", "twice", lambda text: text.replace(b'"depth"', b'"width"')),
        ("NaN", "NaN", lambda text: text.replace(b'"width": 4', b'"width": NaN')),
        ("Infinity", "Infinity", lambda text: text.replace(b'"width": 4', b'"width": -Infinity')),
        ("1e999", "width", lambda text: text.replace(b'"width": 4', b'"width": 1e999')),
        ("9000 digits", "damaged", lambda text: text.replace(b'"width": 4', b'"width": ' + b"4" * 9_000)),
        ("no UTF-8", "damaged", lambda text: text.replace(b"tiny", b"t\xffny")),
        ("UTF-16", "damaged", lambda text: text.decode().encode("utf-16")),
        ("a byte order mark", "damaged", lambda text: b"\xef\xbb\xbf" + text),
        ("half a surrogate pair", "printable", lambda text: text.replace(b'"tags": ["a"', b'"tags": ["\\ud800"')),
        ("a comment", "damaged", lambda text: b"// hello\n" + text),
        ("lists nested deep", "damaged", lambda text: b"[" * 400_000),
        ("objects nested deep", "damaged", lambda text: b'{"a":' * 150_000),
        ("a megabyte and more", "longer", lambda text: text + b" " * 1_000_000),
        ("a megabyte of lists", "object", lambda text: b"[" + b"[]," * 333_000 + b"[]]"),
        ("a megabyte of keys", "exactly", lambda text: edits.many_keys(70_000)),
        ("null", "object", lambda text: b"null"),
        ("text", "object", lambda text: b'"tiny"'),
        ("nothing", "damaged", lambda text: b""),
    ]:
        yield Case(f"config: {what}", says, then_reseal(lambda at, edit=edit: edits.edit_text(at / CONFIG, edit)))


def manifests() -> Iterator[Case]:
    for key, value, says in [
        ("format", 2, "update"),
        ("format", [1], "update"),
        ("tensors", [], "tensors"),
        ("tensors", {}, "manifest.json lists"),
        ("tensors", {"thresholds": ["F32 [1]"]}, "manifest.json lists"),
        ("files", [], "files"),
        ("files", {}, "files"),
        ("files", {"../../etc/passwd": {"bytes": 1, "sha256": ""}}, "files"),
        ("files", {n: {"bytes": 1, "sha256": ""} for n in (WEIGHTS, CONFIG, "/etc/passwd")}, "files"),
        ("files", {n: {"bytes": 1, "sha256": ""} for n in (WEIGHTS, CONFIG, "..\\README.md")}, "files"),
        ("files", {n: {"bytes": 1, "sha256": ""} for n in (WEIGHTS, CONFIG, f"../{CANARY}/README.md")}, "files"),
        ("files", {n: {"bytes": 1, "sha256": ""} for n in (WEIGHTS, CONFIG, README)}, "sha256"),
        ("files", {n: None for n in (WEIGHTS, CONFIG, README)}, "sha256"),
        ("macs", None, "macs"),
        ("macs", {"mean": -1, "worst": 1}, "mean MACs"),
        ("macs", {"mean": "1", "worst": 1}, "mean MACs"),
        ("macs", {"mean": 1, "worst": [1]}, "worst MACs"),
        ("macs", {"mean": 1}, "macs"),
        ("code", "import os", "exactly"),
        ("fingerprint", "0" * 64, "fingerprint"),
        ("fingerprint", None, "fingerprint"),
    ]:
        edit = lambda at, k=key, v=value: edits.edit_json(at / MANIFEST, {k: v}, sealed=k != "fingerprint")  # noqa: E731
        yield Case(f"manifest: {key} {reprlib.repr(value)}", says, edit)
        if key != "fingerprint":
            unsealed = lambda at, k=key, v=value: edits.edit_json(at / MANIFEST, {k: v})  # noqa: E731
            yield Case(f"manifest: {key} {reprlib.repr(value)}, not sealed", "", unsealed)
    for what, says, edit in [
        ("another version", "fingerprint", lambda text: text.replace(b'"dynanet": "', b'"dynanet": "9')),
        ("another space", "fingerprint", lambda text: text.replace(b'": ', b'":  ', 1)),
        ("a key twice", "twice", lambda text: text.replace(b'"macs"', b'"format"')),
        ("NaN", "NaN", lambda text: text.replace(b'"mean": ', b'"mean": NaN, "x": ')),
        ("1e999", "MACs", lambda text: text.replace(b'"mean": 1.5', b'"mean": 1e999')),
        ("nested deep", "damaged", lambda text: text.replace(b'"mean": ', b'"mean": ' + b"[" * 100_000)),
        ("nested", "fingerprint", lambda text: text.replace(b'"0.', b'{"a":' * 300 + b"1" + b"}" * 300 + b',"x":"', 1)),
        ("half a surrogate pair", "fingerprint", lambda text: text.replace(b'"dynanet": "', b'"dynanet": "\\ud800')),
        ("a megabyte and more", "longer", lambda text: text + b"\n" * 1_000_000),
    ]:
        yield Case(f"manifest: {what}", says, lambda at, edit=edit: edits.edit_text(at / MANIFEST, edit))
