"""The header of a GGUF file is read as the package gguf reads it, and the tensors as transformers loads them."""

import gguf
import numpy as np
import pico
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from mla_convert.core.errors import InputError
from mla_convert.source.checkpoint import gguf_header, gguf_reader
from mla_convert.source.checkpoint.gguf_file import read_gguf
from mla_convert.source.checkpoint.gguf_header import LONGEST, read_header
from mla_convert.source.checkpoint.gguf_model import open_gguf
from mla_convert.source.source import open_source

KINDS = ("F32", "F16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "BF16", "IQ4_NL")


@pytest.fixture
def varied(tmp_path):
    """A file with every type of metadata and several types of tensors."""
    writer = gguf.GGUFWriter(tmp_path / "varied.gguf", "llama")
    values = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -9, "uint32": 1 << 31, "int32": -5, "float32": 0.1,
              "uint64": 1 << 60, "int64": -(1 << 40), "float64": 1e-300, "bool": True, "string": "naïve"}  # fmt: skip
    for name, value in values.items():
        getattr(writer, f"add_{name}")(f"llama.{name}", value)
    writer.add_array("llama.few", [3, 1, 2])
    writer.add_array("llama.words", ["a", "", "ß"])
    writer.add_array("llama.many", [*range(LONGEST + 1)])
    writer.add_token_list([f"t{index}" for index in range(LONGEST + 7)])
    writer.add_string("llama.last", "behind the long ones")
    generator = np.random.default_rng(0)
    for name in KINDS:
        rows = generator.standard_normal((3, 512), dtype=np.float32)
        kind = GGMLQuantizationType[name]
        if name in ("Q4_K", "Q6_K", "IQ4_NL"):  # the package only dequantises these
            block, size = gguf.GGML_QUANT_SIZES[kind]
            rows = generator.integers(0, 60, (3, 512 // block * size), dtype=np.uint8)
        else:
            rows = gguf.quantize(rows, kind)
        writer.add_tensor(name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "varied.gguf"


def test_metadata_are_those_of_the_package(varied):
    header, expected = read_header(varied), GGUFReader(varied)
    fields = {key: field for key, field in expected.fields.items() if not key.startswith("GGUF.")}
    assert list(header.metadata) == list(fields) and header.count == len(fields)
    for key, field in fields.items():
        value = field.contents()
        long = isinstance(value, list) and len(value) > LONGEST
        assert header.metadata[key] == (len(value) if long else value), key
        assert (key in header.pairs) == (not long)


def test_tensors_are_those_of_the_package(varied):
    header, expected = read_header(varied), GGUFReader(varied)
    assert list(header.tensors) == [tensor.name for tensor in expected.tensors] == list(KINDS)
    for tensor in expected.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.kind, ours.size, ours.offset) == (tensor.tensor_type, tensor.n_bytes, tensor.data_offset)
        assert ours.shape == (3, 512)
        assert np.array_equal(header.data(tensor.name), tensor.data), tensor.name
        assert np.array_equal(header.data(tensor.name, slice(1, 2)), tensor.data[1:2])


def test_a_file_cut_off_anywhere_is_refused(varied):
    content, place = varied.read_bytes(), varied.with_name("cut.gguf")
    header = read_header(varied)
    ends = [0, 3, 4, 8, 23, 24, *range(25, 700, 37), header.pairs_end, header.pairs_end + 9, len(content) - 1]
    for end in ends:
        place.write_bytes(content[:end])
        with pytest.raises(InputError, match=r"cut\.gguf cannot be read as GGUF"):
            read_gguf(place)


@pytest.mark.parametrize(
    "place, value, words",
    [
        (0, b"GGML", "magic"),
        (4, b"\0\0\0\3", "byte order"),
        (4, b"\1\0\0\0", "version 1"),
        (8, b"\xff" * 8, "cannot be read"),
    ],
)
def test_another_format_is_refused(varied, place, value, words):
    content = bytearray(varied.read_bytes())
    content[place : place + len(value)] = value
    varied.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_gguf(varied)


def test_the_configuration_is_read_without_the_vocabulary(tmp_path, monkeypatch):
    """Transformers reads a file without long arrays, whose configuration is that of the file."""
    monkeypatch.setattr(gguf_header, "LONGEST", 16)
    path, read = pico.save_gguf(tmp_path / "model.gguf"), []
    from transformers import AutoConfig

    expected = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    original = GGUFReader.__init__

    def record(self, place, *args):
        original(self, place, *args)
        read.append(set(self.fields))

    monkeypatch.setattr(GGUFReader, "__init__", record)
    source = open_source(str(path), weights=False)
    assert read and not any("tokenizer.ggml.tokens" in fields for fields in read)
    assert source.config.vocab_size == pico.VOCAB
    found = open_gguf(path)
    with found.file.described() as described:
        own = AutoConfig.from_pretrained(described.parent, gguf_file=described.name).to_dict()
    assert {key: value for key, value in own.items() if key != "_name_or_path"} == {
        key: value for key, value in expected.items() if key != "_name_or_path"
    }


def test_tensors_are_read_one_by_one(tmp_path, monkeypatch):
    """Values are those that transformers loads, and a read touches no other tensor."""
    path = pico.save_gguf(tmp_path / "model.gguf")
    opened = open_gguf(path)
    loaded = dict(opened.load().named_parameters())
    reader = open_source(str(path)).reader
    touched, original = [], gguf_header.GgufHeader.data
    monkeypatch.setattr(
        gguf_header.GgufHeader, "data", lambda self, name, *rows: touched.append(name) or original(self, name, *rows)
    )
    assert set(reader.names()) == set(loaded)
    for name, parameter in loaded.items():
        touched.clear()
        assert torch.equal(reader.read([name])[name], parameter) and len(touched) == 1
        assert reader.shape(name) == tuple(parameter.shape) and reader.dtype(name) == torch.float32
        assert torch.equal(reader.rows(name, 3, 7), parameter[3:7])


def test_threads_dequantise_the_same(varied, monkeypatch):
    header = read_header(varied)
    expected = {name: gguf.dequantize(header.data(name), header.tensors[name].kind) for name in KINDS}
    monkeypatch.setattr(gguf_reader, "CHUNK", 512)  # a row at a time
    for name in KINDS:
        found = gguf_reader._dequantised(header.data(name), header.tensors[name].kind)
        assert found.shape == (3, 512) and np.array_equal(found, expected[name]), name


def test_a_type_that_is_not_dequantised_is_refused(tmp_path, monkeypatch):
    path = pico.save_gguf(tmp_path / "model.gguf")

    def refuse(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(InputError, match="F32, which the package gguf does not dequantise"):
        open_source(str(path))
