"""From files of sounds, series and sentences to answers, by commands alone."""

import json
import wave

import numpy as np
import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning's, see tests/train/conftest.py
    pytest.mark.filterwarnings("always:text.s. .*:dynanet.data.text.TruncationWarning"),  # one of them is about it
]
SMALL = ["--recipe.optimizer", "adamw", "--recipe.lr", "0.01", "--recipe.batch", "8", "--recipe.epochs", "3"]
GRU = ["--model.name", "recurrent_stop", "--model.arguments.hidden", "8"]
ENCODER = ["--model.name", "text_exits", "--model.arguments.width", "12", "--model.arguments.depth", "2"]
ENCODER += ["--model.arguments.heads", "2", "--model.arguments.hidden", "16", "--data.size", "6"]


def sound(path, hertz, seconds, rate=8000):
    path.parent.mkdir(exist_ok=True)
    samples = 8000 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two pitches to tell apart, in recordings of different lengths; the same as series; and two words."""
    place = tmp_path_factory.mktemp("data")
    for index in (*range(3), *range(5, 9), *range(10, 22)):
        for digit, hertz in ((0, 500), (1, 2000)):
            sound(place / "fsdd" / f"{digit}_some_{index}.wav", hertz + 10 * index, 0.1 + 0.005 * index)
    header = "@timeStamps false\n@univariate true\n@classLabel true low high\n@data\n"
    for part, rows in (("TRAIN", 24), ("TEST", 6)):
        lines = [f"{','.join([str(n % 2)] * (4 + n % 5))}:{('low', 'high')[n % 2]}\n" for n in range(rows)]
        (place / f"Two_{part}.ts").write_text(header + "".join(lines))
    for part, rows in (("train", 16), ("dev", 4), ("test", 4)):
        (place / f"words.{part}").write_text("0 a bad film\n1 quite a good one\n" * rows)
    return place


def answered(call, *arguments):
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_sounds_from_nothing_to_answers(place, call, refused, tmp_path):
    run, bundle = tmp_path / "run", tmp_path / "half"
    assert answered(call, "train", run, "--data.name", "spoken_digits", "--data.place", place / "fsdd", *GRU, *SMALL)
    choices = answered(call, "calibrate", run, "--shares", "[0.75]", "--risk", "null")["operating_points"]
    assert [each["requested"] for each in choices] == ["75 % of the MACs"]
    results = answered(call, "evaluate", run)
    assert results["test_samples"] == 6 and results["accuracy_per_exit"][-1] > 0.9
    assert results["operating_points"][0]["test_macs_share"] < 0.9, "of the mean: lengths differ"
    answered(call, "export-bundle", run, bundle, "--share", "0.75")
    for model in (run, bundle):
        rows = answered(call, "predict", model, place / "fsdd")["answers"]
        assert len(rows) == 38 and len({row["macs"] for row in rows}) > 1
        assert np.mean([row["input"].split("/")[-1].startswith(row["class"]) for row in rows]) > 0.8
    (row,) = answered(call, "predict", run, place / "fsdd" / "1_some_0.wav")["answers"]
    assert row["class"] == "1"
    assert row["macs"] == next(
        r["macs"] for r in answered(call, "predict", run, place / "fsdd")["answers"] if r["input"] == row["input"]
    )
    for digit, hertz in (("0", 600), ("1", 2100)):
        rows = [
            answered(call, "predict", bundle, sound(tmp_path / "asked.wav", hertz, 0.2, rate))["answers"][0]
            for rate in (8000, 16000, 44100)
        ]
        assert [row["class"] for row in rows] == [digit] * 3, "at any rate that holds the frequencies"
    assert "has 4000 samples per second, and the model was trained on sounds of 8000" in refused(
        "predict", run, sound(tmp_path / "asked.wav", 600, 0.2, 4000)
    )
    assert "report.html" in answered(call, "report", run)["report"]
    rows = answered(call, "bench", run, "--share", "0.75", "--batches", "[1, 4]", "--threads", "[1]", "--rounds", "1")
    assert [row["best_dense"] in ("torch GRU", "onnxruntime") for row in rows["rows"]] == [True, True]
    assert all(row["macs_ratio"] > 1 for row in rows["rows"]) and (run / "bench.csv").exists()
    assert "6 samples for a batch of 8" in refused("bench", run, "--share", "0.75", "--batches", "[8]")
    long = sound(tmp_path / "long.wav", 500, 3.0)
    assert "frames for a layer made for" in refused("predict", run, long)
    assert "is a sound, and the model does not take any" in refused("predict", digits_like(call, tmp_path), long)


def digits_like(call, tmp_path):
    """A model of something else: of sentences."""
    for part in ("train", "test"):
        (tmp_path / f"few.{part}").write_text("0 bad bad\n1 good good\n" * 8)
    run = tmp_path / "words"
    answered(call, "train", run, "--data.name", "sentences", "--data.place", tmp_path / "few", *ENCODER, *SMALL)
    return run


def test_series_are_told_apart(place, call, tmp_path):
    run = tmp_path / "run"
    answered(call, "train", run, "--data.name", "time_series", "--data.place", place / "Two", *GRU, *SMALL)
    answered(call, "calibrate", run, "--shares", "[0.9]", "--risk", "null")
    assert answered(call, "evaluate", run)["accuracy_per_exit"][-1] == 1


def test_sentences_from_nothing_to_answers(place, call, refused, tmp_path):
    run, texts = tmp_path / "run", tmp_path / "texts.txt"
    answered(call, "train", run, "--data.name", "sentences", "--data.place", place / "words", *ENCODER, *SMALL)
    answered(call, "calibrate", run, "--shares", "[0.8]", "--risk", "null")
    results = answered(call, "evaluate", run)
    assert results["test_samples"] == 8 and results["accuracy_per_exit"][-1] == 1
    texts.write_text("quite a good one\nunheard words\n\nbad " + "film " * 9 + "\n")
    code, out, err = call("predict", run, texts, "--json")
    rows = json.loads(out)["answers"]
    assert code == 0 and [row["class"] for row in rows][::2] == ["1", "0"]
    assert "text(s) [2] have more than 6 words and were truncated" in err
    assert rows[2]["macs"] > rows[0]["macs"], "padding costs nothing"
    texts.write_bytes("\ufeffbad\r\nquite a good one\r\nunheard words\r\n".encode())
    (first, *others) = answered(call, "predict", run, texts)["answers"]
    assert first["input"] == "bad" and first["class"] == "0", "one word, and no byte order mark in it"
    assert others == rows[:2], "prices are the same whatever comes first"
    assert "report.html" in answered(call, "report", run)["report"]
    (row,) = answered(call, "bench", run, "--share", "0.8", "--batches", "[4]", "--threads", "[1]", "--rounds", "1")[
        "rows"
    ]
    assert row["best_dense"] in ("eager", "onnxruntime") and row["samples"] == 8
    answered(call, "export-bundle", run, tmp_path / "bundle")
    assert "only a run that was trained on sentences knows the words" in refused("predict", tmp_path / "bundle", texts)
    (run / "words.txt").write_text("two words\n")
    assert "is not a vocabulary, or damaged" in refused("predict", run, texts)
    texts.write_text("\n")
    assert "holds no sentences" in refused("predict", run, texts)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--data.name", "spoken_digits"], "--data.place FOLDER"),
        (["--data.name", "spoken_digits", "--data.place", "nowhere"], "no recordings of the train part"),
        (
            ["--data.name", "spoken_digits", "--data.place", "x", "--data.size", "3"],
            "size is not supported for spoken_d",
        ),
        (["--data.name", "time_series", "--data.place", "nowhere"], "nowhere_TRAIN.ts"),
        (
            ["--data.name", "time_series", "--data.place", "x", "--data.size", "3"],
            "size is not supported for time_series",
        ),
        (["--data.name", "sentences", "--data.place", "nowhere"], "nowhere.train"),
    ],
)
def test_what_makes_no_sense(arguments, says, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused("train", "new", *arguments)
    assert not (tmp_path / "new").exists()


def test_a_network_of_images_is_none_of_sentences(place, refused, tmp_path):
    given = ["--data.name", "sentences", "--data.place", place / "words", "--model.name", "staged_resnet"]
    assert "model.name is staged_resnet, which has no argument " in refused("train", tmp_path / "new", *given)
