"""A checkpoint's headers are read lazily; each fault is one sentence, and the rest is still listed."""

import json
import os
import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors.numpy import save_file

from fpxbench.checkpoint.checkpoint_folder import open_checkpoint
from fpxbench.checkpoint.gguf_header import BLOCK_TYPES
from fpxbench.checkpoint.tensor_entry import CheckpointError

TENSORS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b.weight": np.ones((2, 2), np.float16)}


def write_raw(path, header, data=b"\0" * 64):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2, 2), begin=0, end=16):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_a_file_of_the_safetensors_library_is_listed_and_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    found = open_checkpoint(tmp_path / "model.safetensors")
    assert not found.problems and found.metadata == {"format": "pt"}
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {"a.weight": (3, 4), "b.weight": (2, 2)}
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(found.tensors[name].numbers(), values)


def test_a_file_of_the_gguf_library_is_listed_and_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(200)])
    weight = np.linspace(-1, 1, 4 * 64, dtype=np.float32).reshape(4, 64)
    writer.add_tensor("plain", weight)
    packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.q", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_checkpoint(tmp_path / "model.gguf")
    assert not found.problems and found.metadata["general.architecture"] == "llama"
    assert len(found.metadata["tokenizer.ggml.tokens"]) == 64
    np.testing.assert_array_equal(found.tensors["plain"].numbers(), weight)
    stored = found.tensors["blk.0.q"]
    assert (stored.dtype, stored.shape) == ("Q8_0", (4, 64))
    np.testing.assert_array_equal(stored.raw(), packed.reshape(-1))


def test_every_block_type_has_the_gguf_librarys_size():
    for kind, (elements, nbytes) in gguf.GGML_QUANT_SIZES.items():
        assert BLOCK_TYPES[kind.value] == (kind.name, elements, nbytes)


@pytest.mark.parametrize(("header", "says"), [
    ({"x": entry(dtype="F33")}, "dtype 'F33'"), ({"x": entry(shape=(-1, 4))}, "shape [-1, 4]"),
    ({"x": entry(shape=(1 << 60, 4))}, "which no tensor can have"),
    ({"x": entry(end=1 << 50)}, "the file is cut short"), ({"x": entry(begin=8, end=4)}, "run backwards"),
    ({"x": entry(end=12)}, "has 12 bytes, and F32 [2, 2] takes 16"),
    ({"x": entry(), "y": entry(begin=8, end=24)}, "overlaps 'x'"), ({"x": 5}, "not described as a tensor"),
    ({"x": entry(shape=(True, 4))}, "which no tensor can have")
])
def test_one_bad_tensor_is_one_sentence_and_the_good_one_is_listed(tmp_path, header, says):
    header["good"] = entry(begin=32, end=48)
    found = open_checkpoint(write_raw(tmp_path / "m.safetensors", header))
    assert "good" in found.tensors and len(found.problems) == 1
    assert says in found.problems[0] and "m.safetensors" in found.problems[0] and "\n" not in found.problems[0]


@pytest.mark.parametrize(("content", "says"), [
    (b"", "0 bytes, too short"),
    ((1 << 55).to_bytes(8, "little") + b"{}", "claims 36028797018963968 bytes"),
    (b"\x05\0\0\0\0\0\0\0[1,2]", "a JSON list, not an object"),
    (b"\x04\0\0\0\0\0\0\0{abc", "is not JSON"),
    (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "claims 1152921504606846976 tensors"),
    (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "GGUF version 9"),
    (b"GGUF" + struct.pack("<IQQ", 3, 1, 0), "cut short"),
])
def test_a_file_of_which_nothing_can_be_used_says_why(tmp_path, content, says):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="m.safetensors") as refusal:
        open_checkpoint(tmp_path / "m.safetensors")
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def test_in_a_folder_each_fault_is_a_sentence_and_the_rest_is_shown(tmp_path):
    folder, outside = tmp_path / "model", tmp_path / "elsewhere.safetensors"
    folder.mkdir()
    save_file(TENSORS, outside)
    os.symlink(outside, folder / "linked.safetensors")
    save_file(TENSORS, folder / "model-1.safetensors")
    save_file({"a.weight": TENSORS["a.weight"], "c.weight": TENSORS["b.weight"]}, folder / "model-2.safetensors")
    (folder / "model-3.safetensors").write_bytes(b"\xff" * 64)
    (folder / "old.bin").write_bytes(b"pickle")
    (folder / "config.json").write_text("[]")
    weight_map = {"a.weight": "model-1.safetensors", "z.weight": "../../etc/passwd", "y.weight": "model-9.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = open_checkpoint(folder)
    assert set(found.tensors) == {"a.weight", "b.weight", "c.weight"}
    for words in ("link out of the folder", "in model-1.safetensors and in model-2.safetensors",
                  "model-3.safetensors: its header claims",
                  "1 file of Python pickles", "config.json: a JSON list", "'../../etc/passwd', which is a path",
                  "'model-9.safetensors', which is not in the folder", "2 tensors are in the index but in no file",
                  "2 tensors are in a file but not in the index"):
        assert sum(words in problem for problem in found.problems) == 1, (words, found.problems)


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(TENSORS, blobs / "0123")
    os.symlink("../../blobs/0123", snapshot / "model.safetensors")
    found = open_checkpoint(snapshot)
    assert set(found.tensors) == set(TENSORS) and not found.problems


def test_a_sharded_checkpoint_of_700_gb_is_listed_from_its_headers_alone(tmp_path, monkeypatch):
    shards, layers, size = 7, 100, 100_000_000_000
    for shard in range(shards):
        each = size // layers
        names = [f"layers.{shard * layers + i}.weight" for i in range(layers)]
        header = {name: entry("U8", (each,), i * each, (i + 1) * each) for i, name in enumerate(names)}
        file = write_raw(tmp_path / f"model-{shard}.safetensors", header, b"")
        os.truncate(file, file.stat().st_size + size)      # sparse: it takes no room
    monkeypatch.setattr(np, "memmap", lambda *_, **__: pytest.fail("a tensor was read"))
    found = open_checkpoint(tmp_path)
    assert not found.problems and len(found.tensors) == shards * layers and found.nbytes == shards * size


def test_a_million_bad_tensors_are_a_few_sentences(tmp_path):
    header = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 5]} for i in range(100_000)}
    header["good"] = entry(begin=32, end=48)
    found = open_checkpoint(write_raw(tmp_path / "m.safetensors", header))
    assert set(found.tensors) == {"good"} and len(found.problems) == 6 and "99995 more" in found.problems[-1]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["safetensors", "gguf"]))
def test_damaged_bytes_never_raise_anything_but_a_checkpoint_error(tmp_path_factory, data, kind):
    folder = tmp_path_factory.mktemp("damaged")
    if kind == "safetensors":
        save_file(TENSORS, folder / "m")
    else:
        writer = gguf.GGUFWriter(folder / "m", "llama")
        writer.add_tensor("t", TENSORS["a.weight"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    content = bytearray((folder / "m").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "m").write_bytes(content[:data.draw(st.integers(0, len(content)))])
    try:
        found = open_checkpoint(folder / "m")
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    for tensor in found.tensors.values():
        tensor.raw()
