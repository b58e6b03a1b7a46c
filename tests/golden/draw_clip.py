"""Parameters and cases behind the golden numbers of the clip encoders (clip_*.npz) in this folder.

Every learned parameter is drawn by its name in the published checkpoint (state_dict_shapes_ast.json), so that no
weights need to travel (NumPy's legacy RandomState streams are frozen). Waveforms and targets come from draw_waveforms
and draw_targets in golden.py: two clips of 10 s at 16 kHz.
"""

import re
import zlib

import numpy as np

# name: seed of the waveforms. draw_waveforms(2, 10, 16000, seed), draw_targets(2, 527, seed + 1).
CASES = {"frontends": 100, "positions": 110, "ast_a": 120, "ast_b": 130}

# The tables of the case "positions".
POSITION_TABLES = {
    "deit.pos_embed": (1, 578, 768),
    "deit.patch_embed.proj.weight": (768, 3, 16, 16),
    "ast.pos_embed": (1, 1214, 768),
}

# Lengths of the rows of a weight, by the first pattern found in its key (1 where there is none): they keep activations
# near 1 and probabilities off 0 and 1.
GAINS = (
    (r"^v\.patch_embed\.", 2.0),
    (r"^v\.blocks\.\d+\.attn\.qkv\.", 1.5),
)


def draw_parameters(shapes):
    """{key: shape} of a published checkpoint, without the prefix `module.` -> {key: float32 array}."""
    drawn = {}
    for key, shape in shapes.items():
        shape = tuple(shape)
        noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
        if key.endswith(("pos_embed", "cls_token", "dist_token")):
            value = 0.3 * noise
        elif len(shape) >= 2:
            gain = next((gain for pattern, gain in GAINS if re.search(pattern, key)), 1.0)
            rows = noise.reshape(shape[0], -1)
            value = gain * noise / np.linalg.norm(rows, axis=1).reshape(-1, *[1] * (len(shape) - 1))
        elif key.endswith("weight"):
            value = 1 + 0.1 * noise
        else:
            value = 0.1 * noise
        drawn[key] = np.asarray(value, dtype=np.float32)
    return drawn
