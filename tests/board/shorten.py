"""A model without most of its layers: it answers nonsense, in a fraction of the time that an emulated board needs."""

from __future__ import annotations

import re
from pathlib import Path

import gguf


def shorten(source: Path, to: Path, layers: int) -> Path:
    """Writes the first `layers` layers of a GGUF model, all else as it is."""
    reader = gguf.GGUFReader(source)
    family = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(to, family)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, inner = field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        value = layers if name == f"{family}.block_count" else field.contents()
        writer.add_key_value(name, value, kind, inner)
    for tensor in reader.tensors:
        block = re.match(r"blk\.(\d+)\.", tensor.name)
        if block is None or int(block[1]) < layers:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to
