"""Arrays as PNG data URIs, written without an image library."""

import base64
import struct
import zlib

import numpy as np

LARGEST = 400  # pixels on the longer side; larger pictures are subsampled, to keep the page below 2 MB


def data_uri(pixels: np.ndarray) -> str:
    """A picture as a data URI.

    Args:
        pixels: (H, W) grey, (H, W, 3) colour or (H, W, 4) colour with opacity, uint8.
    """
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def stride(height: int, width: int, largest: int = LARGEST) -> int:
    """The stride at which a picture is subsampled to at most `largest` pixels on its longer side."""
    return -(-max(height, width) // largest)


def coloured(index: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A picture (H, W, 4) uint8 of indices (H, W) in colours (n, 3), transparent where an index is negative."""
    rgba = np.zeros((*index.shape, 4), np.uint8)
    rgba[index >= 0, :3] = colours[index[index >= 0]]
    rgba[index >= 0, 3] = 255
    return rgba


def dimmed(rgba: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The picture (H, W, 4), faint and hatched where the mask (H, W) is set."""
    rgba = rgba.copy()
    rows, columns = np.indices(where.shape)
    hatch = (rows + columns) % 4 == 0
    rgba[where, 3] = 70
    rgba[where & hatch, 3] = 0
    return rgba


def depth(labels: np.ndarray) -> np.ndarray:
    """The distance in pixels from the edge of the field of equal labels, (H, W) int; 0 where the label is negative."""
    outside = np.pad(labels, 1, constant_values=-1)
    shifts = [(slice(0, -2), slice(1, -1)), (slice(2, None), slice(1, -1)),
              (slice(1, -1), slice(0, -2)), (slice(1, -1), slice(2, None))]  # fmt: skip
    equal = [outside[shift] == labels for shift in shifts]
    inside = labels >= 0
    found = inside.astype(int)
    while inside.any():
        around = np.pad(inside, 1)
        inside = np.logical_and.reduce(
            [inside, *(same & around[shift] for same, shift in zip(equal, shifts, strict=True))]
        )
        found += inside
    return found


def places(labels: np.ndarray, apart: float, least: int = 3) -> list[tuple[int, int, int]]:
    """Where to write the numbers of large fields: (row, column, label) of their innermost pixels.

    Args:
        labels: (H, W), negative outside fields.
        apart: least distance between two numbers in pixels; three times that between equal ones.
        least: least distance from the edge of the field.
    """
    inner = depth(labels)
    found = np.argwhere(inner >= least)
    found = found[np.argsort(-inner[tuple(found.T)], kind="stable")]
    chosen = []
    while len(found):
        row, column = found[0].tolist()
        label = int(labels[row, column])
        chosen.append((row, column, label))
        far = np.where(labels[tuple(found.T)] == label, 3 * apart, apart)
        found = found[np.hypot(*(found - found[0]).T) >= far]
    return chosen


def png(pixels: np.ndarray) -> bytes:
    """Encode as PNG (ISO 15948) with eight bits per channel and without filters, which suits few colours."""
    assert pixels.dtype == np.uint8 and pixels.size, "callers check"
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    height, width, channels = pixels.shape
    kind = {1: 0, 3: 2, 4: 6}[channels]
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, width * channels)], 1)
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
