"""What a file is that the safetensors library does not open, by its first bytes or its suffix, and what to do with it.

Only a file whose header says that it should be longer is called cut short: whoever reads that deletes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
PICKLE_REFUSED = (
    "is a pickle, and loading a pickle runs whatever code it holds. Only .safetensors is read. Convert it once in a "
    "place you trust: "
    "`safetensors.torch.save_file(torch.load(path, weights_only=True), 'out.safetensors')`, or take the repository's "
    "safetensors files."
)
_ONLY = "; only .safetensors is read, so take the checkpoint's safetensors files"
_UNPACK = "; unpack it and give what is in it"
_PICTURE = " and holds no weights"

MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a git-lfs pointer and not the file itself; run `git lfs pull` where it was "
     "cloned, or download it"),
    (b"GGUF", "is a GGUF file, whose weights are quantized" + _ONLY),
    (b"GGML", "is a GGML file, whose weights are quantized" + _ONLY),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras and TensorFlow write them" + _ONLY),
    (b"\x93NUMPY", "is a NumPy array" + _ONLY),
    (b"ORTM", "is a model of ONNX Runtime" + _ONLY),
    (b"ftrt", "is a TensorRT engine" + _ONLY),
    (b"\x1f\x8b", "is a gzip archive" + _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive" + _UNPACK),
    (b"Rar!", "is a RAR archive" + _UNPACK),
    (b"\xfd7zXZ", "is an xz archive" + _UNPACK),
    (b"BZh", "is a bzip2 archive" + _UNPACK),
    (b"\x28\xb5\x2f\xfd", "is a Zstandard archive" + _UNPACK),
    (b"\x89PNG", "is a PNG picture" + _PICTURE),
    (b"\xff\xd8\xff", "is a JPEG picture" + _PICTURE),
    (b"RIFF", "is a WebP picture or a sound" + _PICTURE),
    (b"GIF8", "is a GIF picture" + _PICTURE),
    (b"%PDF", "is a PDF document" + _PICTURE),
)  # fmt: skip
"""First bytes -> what a file that begins with them is, and what to do."""

SUFFIXES = {
    ".gguf": dict(MAGIC)[b"GGUF"],
    ".onnx": "is an ONNX graph" + _ONLY,
    ".msgpack": "is a file of Flax (msgpack)" + _ONLY,
    ".h5": dict(MAGIC)[b"\x89HDF\r\n\x1a\n"],
    ".npz": "is an archive of NumPy arrays" + _ONLY,
    ".pb": "is a graph of TensorFlow" + _ONLY,
    ".tflite": "is a graph of TensorFlow Lite" + _ONLY,
    ".engine": dict(MAGIC)[b"ftrt"],
    ".mlmodel": "is a Core ML model" + _ONLY,
    ".index": "is part of a TensorFlow checkpoint" + _ONLY,
    ".tar": "is a tar archive" + _UNPACK,
}
"""Suffix -> the same, for formats without first bytes of their own."""

_OLD_PICKLES = tuple(bytes([0x80, protocol]) for protocol in (2, 3, 4, 5))
_HEADER_LIMIT = 100_000_000
"""Bytes of the largest header that safetensors allows."""


def what_is_wrong(path: Path) -> str:
    """What a file is that is not read, as the rest of a sentence that begins with its path.

    Args:
        path: A file that exists.
    """
    size = path.stat().st_size
    if size == 0:
        return "is empty; download or write it again"
    with path.open("rb") as file:
        start = file.read(4096)
    if cut := _cut_safetensors(path, start, size):
        return cut
    if start.startswith(b"PK\x03\x04"):
        return _archive(start, path)
    found = next((said for magic, said in MAGIC if start.startswith(magic)), None)
    if found or (found := SUFFIXES.get(path.suffix.lower())):
        return found
    if path.suffix in PICKLES or start.startswith(_OLD_PICKLES):
        return PICKLE_REFUSED
    return _text(path, start) or (
        f"({size} bytes) is not in the safetensors format, nor in another that is known here{_ONLY}"
    )


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file does: with the length of its header, and then the header."""
    with path.open("rb") as file:
        start = file.read(16)
    return _header_length(start) is not None


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file that is whole, read without numpy and PyTorch.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no safetensors file, or its tensors do not fill it.
    """
    with path.open("rb") as file:
        length = _header_length(file.read(9))
        file.seek(8)
        header = _json(file.read(length or 0))
    if length is None or not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file; write it again")
    metadata = header.pop("__metadata__", {})
    try:
        spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
        begins, ends = [begin for begin, _ in spans], [end for _, end in spans]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has a safetensors header that says not where its tensors are; write it again"
        ) from error
    if not isinstance(metadata, dict) or [*begins, path.stat().st_size - 8 - length] != [0, *ends]:
        raise ValueError(f"{path} is a safetensors file that is not whole; write it again")
    return metadata


def _header_length(start: bytes) -> int | None:
    length = int.from_bytes(start[:8], "little")
    return length if start[8:9] == b"{" and 0 < length <= _HEADER_LIMIT else None


def _cut_safetensors(path: Path, start: bytes, size: int) -> str | None:
    """What is said of a safetensors file of another length than its header says; None for others."""
    length = _header_length(start)
    if length is None:
        return None
    wanted = 8 + length
    if wanted <= size:
        with path.open("rb") as file:
            file.seek(8)
            header = _json(file.read(length))
        if not isinstance(header, dict):
            return f"({size} bytes) has a safetensors header that is not JSON; download or write it again"
        ends = [
            entry["data_offsets"][1] for entry in header.values() if isinstance(entry, dict) and "data_offsets" in entry
        ]
        wanted += max(ends, default=0)
    if wanted == size:
        return f"({size} bytes) is a safetensors file that the installed safetensors library does not open"
    if wanted < size:
        return f"({size} bytes) is longer than its safetensors header says, {wanted} bytes; download or write it again"
    more = "at least " if wanted == 8 + length else ""
    return f"({size} bytes) is cut short, of {more}{wanted} bytes; delete it and download or write it again"


def _archive(start: bytes, path: Path) -> str:
    if b"data.pkl" in start or b"/version" in start or path.suffix in PICKLES:
        return PICKLE_REFUSED
    return SUFFIXES[".npz"] if b".npy" in start else "is a zip archive" + _UNPACK


def _text(path: Path, start: bytes) -> str | None:
    """What a file of text is: a web page, a JSON file of a diffusers folder, YAML; None for bytes."""
    try:
        text = start.decode("utf-8").lstrip("\ufeff \t\r\n")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # not just a letter that is cut at the end of what was read
            return None
        text = start[: error.start].decode("utf-8").lstrip("\ufeff \t\r\n")
    if not text.isprintable() and any(ord(c) < 32 and c not in "\t\r\n\f" for c in text):
        return None
    if text[:200].lower().startswith(("<!doctype", "<html", "<head", "<?xml")):
        return (
            "is a web page and not the file that it was meant to be, as when a download needs a login; download it "
            "with `hf download OWNER/REPO FILE`"
        )
    if text.startswith("{"):
        return _json_file(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        return "is a YAML file of settings; give the .safetensors file or the folder of the checkpoint"
    return f"is a text that begins with {text[:40]!r}; give the .safetensors file or the folder of the checkpoint"


def _json_file(path: Path) -> str:
    data = _json(path.read_bytes())
    if not isinstance(data, dict):
        return "is a text that looks like JSON and is none; give the .safetensors file or the folder of the checkpoint"
    if "weight_map" in data:
        return f"is an index of shards; give the folder that it is in, {path.parent}, or the folder above it"
    if path.name == "model_index.json":
        return f"is the index of a folder in the diffusers layout; give the folder, {path.parent}"
    if "_class_name" in data or data.get("architectures"):
        return f"is the config of {data.get('_class_name') or data['architectures'][0]}; give the folder, {path.parent}"
    return "is a JSON file of settings; give the .safetensors file or the folder of the checkpoint"


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None
