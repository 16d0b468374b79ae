"""Tables about mechanisms: what each is worth on real data, and in milliseconds."""

from functools import partial

import numpy as np
from rows import percent, plain, quiet, rows, source, times
from sequence_tables import worth

NOTHING = ["Not measured yet: no row in `results/`."]
REALISED = "realised speed-up (fraction of the MAC saving)"

EXPERIMENTS = {  # file of rows: what was trained, and what a narrower static network is there
    "cifar10_mechanisms": "CIFAR-10, a small ResNet; static: the same network, narrower",
    "cifar10_resnets": "CIFAR-10, networks of the zoo, made of 14-layer ResNets; static: that ResNet, narrower",
    "cifar10_mobilenets": "CIFAR-10, a small MobileNet of the zoo; static: the same network, narrower",
    "cifar10_vits": "CIFAR-10, a small vision transformer of the zoo; static: narrower feed-forward layers",
    "cifar10_resolution": "CIFAR-10, a small ResNet; static: the same network, narrower",
    "tokens_mechanisms": "CIFAR-10, a small vision transformer; static: the same network, narrower",
    "characters_mechanisms": "Tiny Shakespeare, the next of 65 characters, a small network of feed-forward layers; static: fewer neurons",
    "text_mechanisms": "TREC, six kinds of questions, a small transformer; static: fewer neurons",
}

NETWORKS = {  # card: the networks of the experiments that show it
    "layer_skip": ("layer_skip", "layer_skip_rates", "layer_skip_normed", "layer_skip_normed_rates", "recurrent_skip", "skipnet", "convnet_aig"),
    "policy_skip": ("policy_skip", "blockdrop"),
    "path_select": ("path_select", "path_select_balanced"),
    "channel_skip": ("channel_skip", "channel_skip_normed", "fbs_resnet"),
    "channel_gating": ("channel_gating", "channel_gating_tiles", "cgnet"),
    "slimmable": ("slimmable", "ds_net"),
    "pondering": ("act", "act_normed", "pondernet"),
    "soft_tree": ("soft_tree",),
    "neuron_skip": ("neuron_skip", "moefied"),
    "experts": ("experts", "switch", "experts_shared", "experts_by_bias", "experts_limited", "moe_vit"),
    "spatial_skip": ("spatial_skip",),
    "resolution_select": ("size-16", "size-24", "resolution"),
    "glance_focus": (
        *("glance_steered", "glance_anywhere", "glance_drawn", "glance_staged"),
        *(f"glance_{how}-{share}" for how in ("steered", "staged") for share in (0.5, 0.7)),
    ),
    "token_drop": ("dynamic_vit", "dynamic_vit_taught", "dynamic_vit_share", "evit", "evit_as_is"),
    "token_halting": ("a_vit",),
    "position_halting": ("halting-0.05", "halting-0.02"),
    "token_merge": ("tome", "tome_as_is", "tome_similar_as_is"),
    "parameters": ("condconv", "dynamic_conv", "hypernetwork", "squeeze_excite", "dynamic_relu"),
}  # fmt: skip

SPEEDS = {  # card: the networks of `recipes/skipping_speed.py` that show it
    "layer_skip": ("layer_skip",),
    "policy_skip": ("policy_skip",),
    "path_select": ("path_select",),
    "slimmable": ("widths",),
    "channel_skip": ("channel_skip",),
    "channel_gating": ("channel_gating",),
    "cascade": ("cascade",),
    "token_drop": ("token_drop",),
}

KERNELS = {
    "neuron_skip": "neurons",
    "experts": "experts",
    "spatial_skip": "pixels",
}  # card: networks of `kernel_speed.py`

FOUR = ("over_same_engine", "over_best_dense", "over_flop_ratio", "over_latency_theory")


def found(card):
    """Every row about a card, with its experiment."""
    return [
        (experiment, row)
        for experiment in EXPERIMENTS
        for row in rows(f"{experiment}.csv")
        if row["network"] in NETWORKS.get(card, ())
    ]


def mechanism(card):
    """The block of a card: accuracies beside static, full and random, then milliseconds."""
    lines = []
    for experiment, title in EXPERIMENTS.items():
        mine = [row for where, row in found(card) if where == experiment]
        if mine:
            lines += ["", *_accuracies(experiment, title, mine)]
    return (lines + _speeds(card))[1:] or NOTHING


def _accuracies(experiment, title, mine):
    lines = [
        f"{title}, by the same recipe and at the same MACs (interpolated). Random: the decisions of another "
        f"{'image' if 'CIFAR' in title else 'row'}. Constant: kept for less than 2 % or more than 98 % of the rows. Test accuracy, one training each: differences below a point say little.",
        source(mine, f"{experiment}.csv"),
        "",
        "| | epochs | accuracy | MACs | nothing skipped | static, same MACs | widest static | its MACs | random gates | units "
        "that are constant |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in mine:
        accuracy, chance = _share(row["accuracy"]), _share(_chance(row))
        static, full = (_share(row[key]) for key in ("static_accuracy", "full_accuracy"))
        spent, own, widest = (_macs(row[key]) for key in ("macs", "own_macs", "full_macs"))
        lines.append(
            f"| {row['network']} | {row['epochs']} | {accuracy} | {spent} | {own} | {static} | {full} | {widest} | {chance} | "
            + (f"{row['constant_units']} of {row['units']} |" if row["units"] else "|")
        )
    return lines


def _speeds(card):
    lines = []
    for experiment in EXPERIMENTS:
        name = f"{experiment}_speed.csv"
        mine = [row for row in quiet(rows(name)) if row["network"] in NETWORKS.get(card, ())]
        if mine:
            lines += [
                "",
                "Sessions of the trained networks, which are small. Same engine: the same weights with nothing skipped; best "
                f"dense engine: the widest static network's. One thread. {source(mine, name)}",
            ]
            lines += ["", *_four(mine, lambda row: row["network"])]
    mine = [row for row in quiet(rows("skipping_speed.csv")) if row["network"] in SPEEDS.get(card, ())]
    if mine:
        lines += [
            "",
            f"At a larger size, with random weights and gates that keep a given share, one thread. {source(mine, 'skipping_speed.csv')}",
        ]
        lines += [
            "",
            *_four(mine, lambda row: f"{row['channels']} channels, {row['side']} x {row['side']}, keep {row['keep']}"),
        ]
    return lines  # fmt: skip


def _four(mine, named):
    lines = [
        "| | batch | times faster, same engine | than the best dense engine | realised speed-up (fraction of the MAC saving) | scheduling efficiency |",
        "|---|---|---|---|---|---|",
    ]
    for name, batch in dict.fromkeys((named(row), int(row["batch"])) for row in mine):
        cell = [row for row in mine if named(row) == name and int(row["batch"]) == batch]
        values = [float(np.median([float(row[column]) for row in cell])) for column in FOUR]
        shown = [times(value) for value in values]
        if values[-1] < 0.1:
            shown[-1] = ""  # the units run in torch, outside the engine calls that the efficiency is measured against
        lines.append(f"| {name} | {batch} | {' | '.join(shown)} |")
    return lines


def _chance(row):
    """The accuracy with another row's decisions, empty where these cost a different number of MACs (merged tokens)."""
    same = row["random_macs"] and abs(float(row["random_macs"]) / float(row["macs"]) - 1) < 0.05
    return row["random_accuracy"] if same else ""


def _share(value):
    return percent(float(value)) if value else "not measured"


def _macs(value):
    value = float(value)
    return f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value / 1e3:.0f} k"


def points(values):
    """Differences in points, from the lowest to the highest."""
    low, high = (f"{100 * value:+.1f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def choice(card):
    """The measured cells of a mechanism in the table of docs/choosing.md."""
    mine = OTHERWISE[card]() if card in OTHERWISE else [
        tuple(float(row["accuracy"]) - float(other) for other in (row["static_accuracy"], _chance(row)))
        for _, row in found(card)
        if row["static_accuracy"] and _chance(row)
    ]  # fmt: skip
    if not mine:
        return None
    static, chance = ([value for value in column if value is not None] for column in zip(*mine, strict=True))
    trained = [
        row
        for experiment in (*EXPERIMENTS, "bccd")
        for row in quiet(rows(f"{experiment}_speed.csv"))
        if row["network"] in NETWORKS.get(card, ())
    ]
    return points(static) if static else "not measured", points(chance), _ratios(_speed_rows(card)), _ratios(trained)


def _ratios(speeds):
    """Realised speed-up as a fraction of the MAC saving, at four batch sizes, medians."""
    cells = ([float(r["over_flop_ratio"]) for r in speeds if r["batch"] == batch] for batch in ("1", "8", "64", "256"))
    return " / ".join(times(np.median(cell)) if cell else "-" for cell in cells) if speeds else "not measured"


def _speed_rows(card):
    """Rows of one thread on a quiet machine: MSDNet's, a kernel's, a recurrent cell's, or those of `skipping_speed.csv`."""
    if card in RECURRENT:
        mine = [row for row in quiet(rows("recurrent_speed.csv")) if row["network"].startswith(RECURRENT[card])]
        return [{"batch": row["batch"], "over_flop_ratio": row["best_over_flop_ratio"]} for row in mine]
    if card == "early_exit":
        return [row for row in quiet(rows("msdnet_speed.csv")) if row["threads"] == "1"]
    if card in KERNELS:
        mine = [row for row in quiet(rows("kernel_speed.csv")) if row["network"].startswith(KERNELS[card])]
        return [row for row in mine if "mask given" not in row["network"]]
    return [row for row in quiet(rows("skipping_speed.csv")) if row["network"] in SPEEDS.get(card, ())]


def frontier(*networks):
    """Points over static and over random of `cifar10_frontier.csv`: budgets within the static networks' MACs."""
    every = rows("cifar10_frontier.csv")
    static = sorted(
        (float(row["macs"]), float(row["accuracy"])) for row in every if row["network"].startswith("static")
    )
    macs, accuracies = zip(*static, strict=True)
    mine = {
        float(row["macs"]): row
        for row in every
        if row["network"] in networks
        and row["random_exits_accuracy"]
        and macs[0] <= float(row["macs"]) <= macs[-1]
        and max(float(share) for share in row["shares"].split()) < 0.999  # else there is nothing to draw
    }
    return [
        (float(row["accuracy"]) - float(np.interp(np.log(at), np.log(macs), accuracies)),
         float(row["accuracy"]) - float(row["random_exits_accuracy"]))
        for at, row in mine.items()
    ]  # fmt: skip


def scenes():
    """Points over static and over random of `indian_pines.csv`: medians over the splits of the two budgets."""
    found, static = rows("indian_pines.csv"), rows("indian_pines_static.csv")
    return [
        tuple(
            float(np.median([float(row[f"at_{share}"]) for row in found]) - np.median([float(row[key]) for row in where]))
            for where, key in (([row for row in static if row["share"] == str(share)], "accuracy"), (found, f"random_{share}"))
        )
        for share in (50, 25)
    ]  # fmt: skip


def boxes():
    """Points of mAP over static and over random of `bccd.csv`."""
    return [
        tuple(float(row["map"]) - float(row[f"{other}_map"]) for other in ("static", "random"))
        for row in rows("bccd.csv")
        if row["network"] in NETWORKS["position_halting"]
    ]


def labels():
    """Points of mIoU over random exits of `camvid.csv`; static networks of the same MACs were not trained."""
    found = {plain(row["point"]): float(row["miou"]) for row in rows("camvid.csv") if row["network"] == "cascade"}
    random = ", random exits"
    return [(None, miou - found[point + random]) for point, miou in found.items() if point + random in found]


OTHERWISE = {  # cards whose rows are of another kind
    "early_exit": lambda: frontier("staged, early exit", "msdnet, early exit"),
    "cascade": lambda: frontier("cascade, early exit"),
    "scene_exit": scenes,
    "position_halting": boxes,
    "pixel_cascade": labels,
    **{
        card: partial(worth, card)
        for card in ("update_skip", "skim", "early_stop", "jump", "frame_select", "frame_exit", "clip_sampling")
    },
}


def exits():
    """The block of exit criteria: rows of `recipes/cifar10_exits.py`."""
    every = rows("cifar10_exits.csv")
    found = [row for row in every if row["budget"]]
    if not found:
        return NOTHING
    lines = [
        "Criteria on the same trained networks, CIFAR-10: fitted, and thresholds chosen, on held-out images for each budget "
        "of the last exit's MACs. Static: networks with one exit by the same recipe, at the same MACs (interpolated). Random: "
        "exits drawn at the same rates. Selected exits: those left after exits that cost more than they save are switched off.",
        source(found, "cifar10_exits.csv"),
        "",
        "| network | criterion | budget | MACs | accuracy | static | random | selected exits | their MACs | their accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in found:
        cells = [row["network"], row["criterion"], f"{100 * float(row['budget']):.0f} %", _macs(row["macs"])]
        cells += [percent(float(row[key])) for key in ("accuracy", "static_accuracy", "random_accuracy")]
        if row["paying_exits"]:
            cells += [row["paying_exits"], _macs(row["paying_macs"]), percent(float(row["paying_accuracy"]))]
        else:
            cells += [""] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sentences():
    """The block of a text encoder with exits: rows of `recipes/text_exits.py`."""
    found = rows("text_exits.csv")
    if not found:
        return NOTHING
    lines = [
        "Text: MiniLM (6 layers, pretrained) with an exit after each, fine-tuned for a few epochs; budgets chosen on held-out "
        "sentences, shares of the last exit's MACs. Static: the same encoder cut after the given number of layers, at the same MACs "
        "(interpolated). Random: exits drawn at the same rates (in expectation).",
        source(found, "text_exits.csv"),
        "",
        "| set | network | epochs | criterion | budget | accuracy | MACs | static, same MACs | random exits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = [row["data"], row["network"], row["epochs"], row["rule"], row["budget"].replace("%", " %")]
        cells += [percent(float(row["accuracy"])), _macs(row["macs"])]
        cells += [percent(float(row[key])) if row[key] else "" for key in ("static_accuracy", "random_accuracy")]
        lines.append(f"| {' | '.join(cells)} |")
    speeds = quiet(rows("text_exits_speed.csv"))
    if speeds:
        lines += [
            "",
            "Sentences per second, the session with exits against the static encoder in its best engine, one thread. Scheduling "
            "efficiency: against the same engine calls, and native attention between them, run back to back. "
            + source(speeds, "text_exits_speed.csv"),
            "",
            "| set | batch | best static | times faster | refilled | scheduling efficiency | refilled | against the engine calls alone | "
            "refilled | MACs, times fewer |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
    columns = [f"{way}over_{what}" for what in ("best_static", "latency_theory", "engines") for way in ("", "stream_")]
    for data, batch in dict.fromkeys((row["data"], row["batch"]) for row in speeds):
        mine = [row for row in speeds if (row["data"], row["batch"]) == (data, batch)]
        cells = [times(np.median([float(row[column]) for row in mine])) for column in (*columns, "macs_ratio")]
        lines.append(f"| {' | '.join([data.split(',')[0], batch, mine[-1]['best_static'], *cells])} |")
    return lines


def encoders():
    """The block of docs/results.md: the encoder whose speed was measured, at its budget."""
    speeds = quiet(rows("text_exits_speed.csv"))
    lines = [
        "**Text**, MiniLM with an exit after each of its 6 layers; the exits are trained with a frozen encoder. The budget is the "
        "cheapest that loses at most half a point on held-out sentences; sentences per second against the same encoder to its "
        "last layer in the best of four static engines, one thread.",
        source(speeds, "text_exits_speed.csv"),
        "",
        "| | test accuracy, whole encoder | with exits | random exits | MACs of the timed sentences | times the sentences per second, batch 1 | batch 32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for data in dict.fromkeys(row["data"] for row in speeds):
        at = {batch: [r for r in speeds if (r["data"], r["batch"]) == (data, batch)] for batch in ("1", "32")}
        row = at["1"][-1]
        cells = [data.split(",")[0], *(percent(float(row[f"{who}accuracy"])) for who in ("whole_", "", "random_"))]
        cells += [percent(1 / float(row["macs_ratio"]))]
        cells += [times(np.median([float(r["over_best_static"]) for r in mine])) for mine in at.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def kernels(card):
    """The block of a card with native kernels: rows of `recipes/kernel_speed.py`."""
    found = quiet(rows("kernel_speed.csv"))
    mine = [row for row in found if row["network"].startswith(KERNELS[card])] if card in KERNELS else []
    if not mine:
        return NOTHING
    lines = [
        f"Native kernels ({mine[0]['native']}), random weights, one thread. The roofline: per layer, the larger of MACs over the "
        f"processor's measured peak and bytes of weights over its bandwidth. {source(mine, 'kernel_speed.csv')}",
        "",
        "| | keep | batch | times faster, same engine | than the best dense engine | realised speed-up (fraction of the MAC saving) | fraction of the roofline | with "
        "kernels over without |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, keep, batch in dict.fromkeys((row["network"], row["keep"], row["batch"]) for row in mine):
        cell = [row for row in mine if (row["network"], row["keep"], row["batch"]) == (name, keep, batch)]
        columns = ("over_same_engine", "over_best_dense", "over_flop_ratio", "over_roofline", "over_torch")
        cells = " | ".join(times(np.median([float(row[column]) for row in cell])) for column in columns)
        lines.append(f"| {name} | {float(keep):.2f} | {batch} | {cells} |")
    return lines


RECURRENT = {"update_skip": "update skip", "skim": "skim"}  # card: networks of `recipes/recurrent_speed.py`


def recurrent(card):
    """The speed of a recurrent mechanism."""
    mine = [row for row in quiet(rows("recurrent_speed.csv")) if row["network"].startswith(RECURRENT[card])]
    if not mine:
        return NOTHING
    lines = [
        f"Random weights, sequences of {mine[0]['steps']} steps of {mine[0]['inputs']} features, a session on one thread; the best "
        "dense engine reads every step: torch's fused network, a loop over its cell, or ONNX Runtime. "
        f"{source(mine, 'recurrent_speed.csv')}",
        "",
        "| | hidden | steps read | batch | times faster, same engine | than the best dense engine | realised speed-up (fraction of the MAC saving), same engine | best engine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    columns = ("over_same_engine", "over_best_dense", "over_flop_ratio", "best_over_flop_ratio")
    keys = ("network", "hidden", "keep", "batch")
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in mine):
        cell = [row for row in mine if tuple(row[k] for k in keys) == key]
        cells = " | ".join(times(np.median([float(row[column]) for row in cell])) for column in columns)
        kept = percent(np.median([float(row["kept"]) for row in cell]))
        lines.append(f"| {key[0]} | {key[1]} | {kept} | {key[3]} | {cells} |")
    return lines


def break_even():
    """The share of tiles below which skipping pays: rows of `recipes/kernel_speed.py`, a straight line through them."""
    ours = ("pixels, three", "pixels, bottleneck", "tiles")
    found = [row for row in quiet(rows("kernel_speed.csv")) if row["network"].startswith(ours)]
    tiled = {row["network"].split(", ", 2)[2] for row in found if row["network"].startswith("tiles")}
    if not tiled:
        return NOTHING
    lines = [
        "Positions or tiles, and the share of them below which a session is faster than the best dense engine: time over the "
        f"share kept, a straight line through the medians. {source(found, 'kernel_speed.csv')}",
        "",
        "| | batch | faster below | over the best dense engine at 0.10 | 0.25 | 0.50 |",
        "|---|---|---|---|---|---|",
    ]
    for name, batch in dict.fromkeys((row["network"], row["batch"]) for row in found):
        if not any(name.endswith(network) for network in tiled):
            continue
        cell = [row for row in found if (row["network"], row["batch"]) == (name, batch)]
        keeps = sorted({float(row["keep"]) for row in cell})
        over = [float(np.median([float(r["over_best_dense"]) for r in cell if float(r["keep"]) == k])) for k in keeps]
        slope, at_nothing = np.polyfit(keeps, [1 / value for value in over], 1)
        shown = " | ".join(times(value) for value in over)
        lines.append(f"| {name} | {batch} | {times(min(1.0, (1 - at_nothing) / slope))} | {shown} |")
    return lines


def segmentation():
    """Rows of `recipes/camvid.py`."""
    found, speeds = rows("camvid.csv"), quiet(rows("camvid_speed.csv"))
    if not found:
        return NOTHING
    lines = [
        f"Segmentation: {found[0]['data']}, {found[0]['epochs']} epochs from random weights. The cascade leaves at thresholds found "
        "on the validation split for a share of its MACs; random exits: the same exit rates, drawn at random.",
        source(found, "camvid.csv"),
        "",
        "| | | mIoU | pixel accuracy | MACs |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        quality = " | ".join(percent(float(row[key])) for key in ("miou", "pixel_accuracy"))
        lines.append(f"| {row['network']} | {plain(row['point'])} | {quality} | {_macs(row['macs'])} |")
    if speeds:
        lines += [
            "",
            "Milliseconds per frame, one by one, one thread, interleaved: the session, and the same weights without skipping in "
            f"their best engine. {source(speeds, 'camvid_speed.csv')}",
            "",
            "| budget | MACs | session | static | times faster | realised speed-up (fraction of the MAC saving) |",
            "|---|---|---|---|---|---|",
        ]
    for row in speeds:
        ms = " | ".join(f"{float(row[key]):.1f}" for key in ("session_ms", "static_ms"))
        ratios = " | ".join(times(float(row[key])) for key in ("times", "of_flop_ratio"))
        lines.append(f"| {row['budget']} | {_macs(row['macs'])} | {ms} | {ratios} |")
    return lines


def speed_targets():
    """(what, target, values) of the speeds that a target was set for."""
    found = quiet(rows("skipping_speed.csv"))

    def cells(network, batch):
        return [
            float(row["over_flop_ratio"]) for row in found if row["network"] == network and row["batch"] == str(batch)
        ]

    for network, what in (("layer_skip", "layer skip"), ("widths", "widths, 256 channels")):
        for batch in (8, 64, 256):
            yield f"{what}, {REALISED}, batch {batch}", 0.9, cells(network, batch)
    kernel = quiet(rows("kernel_speed.csv"))

    def of(network, batch, column="over_flop_ratio"):
        return [float(r[column]) for r in kernel if r["network"].startswith(network) and r["batch"] == str(batch)]

    yield f"neuron blocks, weights larger than the cache, {REALISED}, batch 1", 0.85, of("neurons", 1)
    yield f"experts, {REALISED}, 1024 tokens", 0.9, of("experts", 1024)
    for size in ("experts 512 x 1024", "experts 768 x 3072"):
        for tokens in (1, 4, 16, 64, 256):
            yield f"{size}, fraction of the roofline, {tokens} tokens", 0.8, of(size, tokens, "over_roofline")
    for name in ("SST-2", "TREC"):
        for batch in ("1", "32"):
            mine = [
                r for r in quiet(rows("text_exits_speed.csv")) if r["data"].startswith(name) and r["batch"] == batch
            ]

            def text(column, mine=mine):
                return [float(row[column]) for row in mine]

            if name == "SST-2":
                yield f"{name}, sentences per second over the best static, batch {batch}", 1.8, text("over_best_static")
            yield f"{name}, scheduling efficiency, batch {batch}", 0.9, text("over_latency_theory")
            yield f"{name}, refilled, scheduling efficiency, batch {batch}", 0.95, text("stream_over_latency_theory")
    frames = [  # the cheapest budget that costs at most half a point on held-out images: the test split is not used
        row
        for row in quiet(rows("camvid_speed.csv"))
        if float(row["held_out_accuracy"]) >= float(row["held_out_full"]) - 0.005
    ]
    cheapest = [float(row["times"]) for row in sorted(frames, key=lambda row: float(row["macs"]))[:1]]
    yield (
        "segmentation, frames per second over the same weights static, budget chosen on held-out images",
        1.5,
        cheapest,
    )
    steps = quiet(rows("recurrent_speed.csv"))
    for what in RECURRENT.values():
        for batch, target in (("64", 0.85), ("256", 0.9)):
            mine = [row for row in steps if row["network"].startswith(what) and row["batch"] == batch]
            ratios = [float(row["best_over_flop_ratio"]) for row in mine]
            yield f"{what}, {REALISED}, against the best dense engine, batch {batch}", target, ratios
    ranet = [row for row in quiet(rows("ranet_speed.csv")) if row["threads"] == "1"]
    for batch, target in (("1", 0.95), ("8", 0.85), ("64", 0.95)):
        mine = [float(row["over_latency_theory"]) for row in ranet if row["batch"] == batch]
        yield f"RANet, scheduling efficiency, batch {batch}", target, mine
    for batch in (8, 64, 256):
        yield f"tokens, {REALISED}, batch {batch}", 0.95, cells("token_drop", batch)
    for batch, target in ((1, 0.9), (8, 0.8)):
        for rows_of, how in (("pixels, ", " with its mask unit"), ("pixels, mask given, ", ", mask given")):
            what = f"{how}, {REALISED}, batch {batch}"
            yield f"pixel convolution{what}", target, of(f"{rows_of}three", batch)
            yield f"whole bottleneck by pixels{what}", 0.8, of(f"{rows_of}bottleneck", batch)


def detection(*names):
    """Rows of `recipes/bccd.py`."""
    every = rows("bccd.csv")
    found = [row for row in every if row["network"] in names]
    if not found:
        return NOTHING
    full = next(row for row in every if row["network"] == "static-1.0")
    size = f"{full['height']} x {full['width']} pixels, {full['epochs']} epochs from random weights"
    lines = [
        f"Detection: BCCD (blood cells), a small one-stage detector, {size}; mAP as COCO counts it on the "
        "72 test images. Static: the same detector with fewer units, by the same recipe, at the same MACs "
        "(interpolated). Random: the same network, every image with the decisions of another.",
        source(found, "bccd.csv"),
        "",
        "| | mAP | at 0.50 | MACs | static, same MACs | at 0.50 | full network | at 0.50 | its MACs | random | at 0.50 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    three = lambda row, *keys: [f"{float(row[k]):.3f}" for k in keys]  # noqa: E731
    for row in found:
        cells = [
            *three(row, "map", "map_50"), f"{float(row['macs']) / 1e6:.0f} M",
            *three(row, "static_map", "static_map_50"), *three(full, "map", "map_50"),
            f"{float(full['macs']) / 1e6:.0f} M", *three(row, "random_map", "random_map_50"),
        ]  # fmt: skip
        lines.append(f"| {row['network']} | {' | '.join(cells)} |")
    maps = [row for row in found if row.get("units_correlation")]
    if maps:
        lines += ["", "Units per position, over all pixels of the test images:", ""]
        lines += ["| | inside the true boxes | outside | correlation with the boxes |", "|---|---|---|---|"]
    for row in maps:
        inside, outside, correlation = (float(row[f"units_{k}"]) for k in ("inside", "outside", "correlation"))
        lines.append(f"| {row['network']} | {inside:.2f} | {outside:.2f} | {correlation:.3f} |")
    speeds = [row for row in quiet(rows("bccd_speed.csv")) if row["network"] in (*names, "static-1.0")]
    if any(row["network"] in names for row in speeds):
        lines += ["", "Milliseconds per image, one thread, the session and the best engine that skips nothing:", ""]
        lines += [
            "| | batch | session | the same network, best dense engine | realised speed-up (fraction of the MAC saving) |",
            "|---|---|---|---|---|",
        ]
        for row in speeds:
            ms = (f"{float(row[k]):.1f}" for k in ("session_ms", "best_dense_ms"))
            lines.append(
                f"| {row['network']} | {row['batch']} | {' | '.join(ms)} | {times(float(row['over_flop_ratio']))} |"
            )
    return lines


def several(*parts):
    """Blocks one after the other, without those that have no rows."""
    there = [part for part in parts if part is not NOTHING]
    return [line for k, part in enumerate(there) for line in ([""] if k else []) + part] or NOTHING
