# SPDX-License-Identifier: Apache-2.0
"""optimum-intel's export with its weights as int8 or int4, by NNCF: `compress_openvino.py EXPORT int8|int4 OUTPUT`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nncf
import openvino as ov


def compress(export: Path, weights: str, output: Path) -> None:
    """Symmetric weights: int8 by row; int4 in groups of 128 everywhere, embedding and head too."""
    model = ov.Core().read_model(export / "openvino_model.xml")
    if weights == "int8":
        compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    else:
        compressed = nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=128, all_layers=True
        )
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    ov.save_model(compressed, output / "openvino_model.xml", compress_to_fp16=False)


if __name__ == "__main__":
    compress(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
