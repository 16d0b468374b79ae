"""Sets of labelled sentences: how they are read and parted. Each comes as {part: (texts, labels)}."""

import csv

import torch

from dynanet.data.splits import stratified
from dynanet.data.text import load_labelled_lines

PARTS = {"train": "train", "held_out": "dev", "test": "test"}


def sst2(folder):
    """Sentences of film reviews, good or bad, in the official parts."""
    return {part: load_labelled_lines(folder / f"stsa.binary.{name}") for part, name in PARTS.items()}


def trec(folder):
    """Questions, by what they ask for (6 classes); a tenth of the training part is held out, as many of each class."""
    train, test = (load_labelled_lines(folder / f"TREC.{name}.all") for name in ("train", "test"))
    return parted(*train, 0.1) | {"test": test}


def agnews(folder):
    """Titles and first sentences of news, 4 classes: the file of the official test part, cut into 80, 10 and 10 %."""
    with (folder / "agnews_test.csv").open(newline="", encoding="utf-8") as file:
        found = [(f"{title}. {text}".replace("\\", " "), int(label) - 1) for label, title, text in csv.reader(file)]
    texts, labels = zip(*found, strict=True)
    first = parted(texts, torch.tensor(labels), 0.2)
    second = parted(*first["held_out"], 0.5)
    return {"train": first["train"], "held_out": second["train"], "test": second["held_out"]}


def parted(texts, labels, share):
    """{"train": ..., "held_out": ...}: a share of every class is held out."""
    aside = round(share * len(labels))
    parts = stratified(labels, [len(labels) - aside, aside], seed=0)
    names = ("train", "held_out")
    return {name: ([texts[i] for i in rows], labels[rows]) for name, rows in zip(names, parts, strict=True)}
