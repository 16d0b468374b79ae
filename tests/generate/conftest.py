"""A small decoder with exits, prompts, and the text that it continues them with, computed without a cache."""

import pytest
import torch

from dynanet.zoo.causal_transformers import causal_transformer

NEW = 14


@pytest.fixture(scope="module")
def model():
    """In float64, so that sums in another order do not change which token is likeliest."""
    torch.manual_seed(0)
    model = causal_transformer(
        vocabulary=20, width=16, heads=2, hidden=32, depth=5, exits=(0, 2, 4), longest=64, layer_dropout=0.2
    )
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model.double().eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(20, (length,), generator=generator) for length in (3, 1, 9, 5)]


@pytest.fixture(scope="module")
def whole(model, prompts):
    """Greedy, without any cache: the whole text again for every token."""
    return torch.stack([step_by_step(model, prompt)[0] for prompt in prompts])


def step_by_step(model, prompt, leave=None):
    ids, exits = prompt[None], []
    for _ in range(NEW):
        with torch.no_grad():
            found = model.features(ids)
            for number, (x, before) in enumerate(found):
                logits = model.logits(number, x[:, -1])
                sure = leave is not None and number + 1 < len(found)
                if sure and leave.confidence(logits, x[:, -1], before[:, -1]) >= leave.thresholds[number]:
                    break
        ids = torch.cat([ids, logits.argmax(-1)[None]], 1)
        exits.append(number)
    return ids[0, len(prompt) :], torch.tensor(exits)
