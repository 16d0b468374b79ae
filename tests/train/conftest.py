import pytest
import torch


def pytest_collection_modifyitems(items):
    """Lightning 2.6 asks torch 2.13 a question that torch has deprecated; nothing of ours can spare it that."""
    for item in items:
        if "tests/train" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
