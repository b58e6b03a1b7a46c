"""Parameters and cases behind the golden numbers of the clip encoders (clip_*.npz) in this folder.

Every learned parameter and BatchNorm statistic is drawn by its name in the published checkpoint (state_dict_shapes_ast.json,
state_dict_shapes_clip.json), so that no weights need to travel (NumPy's legacy RandomState streams are frozen). Waveforms
and targets come from draw_waveforms and draw_targets in golden.py: two clips of 10 s, at 16 kHz where CASES does not say 32.
"""

import re
import zlib

import numpy as np

# name: (front-end, seed of the waveforms). draw_waveforms(2, 10, rate, seed), draw_targets(2, 527, seed + 1).
CASES = {
    "frontends": ("", 100),
    "positions": ("", 110),
    "ast_a": ("a", 120),
    "ast_b": ("b", 130),
    "tal_a": ("a", 140),
    "tal_b": ("b", 150),
    "taltrans_a": ("a", 160),
    "taltrans_b": ("b", 170),
    "transformer_b": ("b", 180),
    "psla_a": ("a", 190),
    "resnet_a": ("a", 200),
    "resnet_b": ("b", 210),
    "mobilenet_a": ("a", 220),
    "fnet_a": ("a", 230),
    "linear_b": ("b", 240),
    "cnn14": ("32 kHz", 250),
    "cnn14_max": ("32 kHz", 260),
    "mn10": ("32 kHz", 270),
}

# front-end: (frames, bands, mean, deviation); the networks see (log-mel - mean) / (2 deviation).
FRONTENDS = {"a": (1024, 128, -4.2677393, 4.5689974), "b": (400, 64, -38.193954, 45.802143)}

# The tables of the case "positions".
POSITION_TABLES = {
    "deit.pos_embed": (1, 578, 768),
    "deit.patch_embed.proj.weight": (768, 3, 16, 16),
    "ast.pos_embed": (1, 1214, 768),
}

# What a network computes itself, and the second names under which TAL and TALtrans checkpoints hold their convolutions.
NOT_DRAWN = re.compile(r"num_batches_tracked$|^positional_encoding\.pe$|^conv\d+\.|^(spectrogram|logmel)_extractor\.")

# Lengths of the rows of a weight, by the first pattern found in its key (1 where there is none): they keep activations
# near 1 and probabilities off 0 and 1.
GAINS = (
    (r"^v\.patch_embed\.", 2.0),  # AST
    (r"^v\.blocks\.\d+\.attn\.qkv\.", 1.5),
    (r"^mlp_head\.1\.", 1.0),
    (r"^conv\.0\.conv\.", 4.0),  # TAL, TALtrans, Transformer, linear
    (r"^conv\.\d+\.conv\.", 1.4),
    (r"slf_attn\.w_[qk]s\.", 1.5),
    (r"^fc_att\.", 2.0),
    (r"^effnet\._conv_stem\.", 4.0),  # PSLA
    (r"^effnet\._blocks\.\d+\._se_", 0.3),
    (r"^effnet\.", 1.5),
    (r"^attention\.(att|cla)\.\d\.", 1.0),
    (r"^model\.conv1\.", 4.0),  # ResNet50
    (r"^model\.layer\d\.\d+\.conv3\.", 0.7),
    (r"^model\.layer\d\.\d+\.conv\d\.", 1.4),
    (r"^attention\.(att|cla)\.", 0.4),
    (r"^model\.features\.0\.0\.", 4.0),  # MobileNetV2
    (r"^model\.features\.(1\.conv\.1|\d+\.conv\.2)\.", 1.0),
    (r"^model\.features\.", 1.4),
    (r"^model\.classifier\.", 0.7),
    (r"^pooler\.(fc|att)\.", 1.5),  # FNet
    (r"^conv_block\d\.", 1.5),  # Cnn14
    (r"^fc_audioset\.", 0.3),
    (r"^features\.0\.0\.", 4.0),  # mn10
    (r"^features\.\d+\.block\.\d\.conc_se_layers\.", 0.3),
    (r"^features\.(1\.block\.1|\d+\.block\.3|(2|3|8|9|10|11)\.block\.2)\.", 1.2),
    (r"^features\.", 1.4),
    (r"^classifier\.5\.", 0.7),
)


def draw_parameters(shapes, salt=""):
    """{key: shape} of a published checkpoint, without the prefix `module.` -> {key: float32 array}."""
    drawn = {}
    for key, shape in shapes.items():
        if NOT_DRAWN.search(key):
            continue
        shape = tuple(shape)
        noise = np.random.RandomState(zlib.crc32((salt + key).encode())).standard_normal(shape)
        small = 0.02 if key.startswith(("effnet.", "model.", "features.")) else 0.1
        if key == "bn0.running_var":  # Cnn14: of a log-mel spectrogram in dB
            value = 100 * (1 + 0.1 * np.abs(noise))
        elif key == "bn0.running_mean":
            value = -35 + 5 * noise
        elif key.endswith("running_var"):
            value = 1 + 0.1 * np.abs(noise)
        elif key.endswith("running_mean"):
            value = small * noise
        elif key.endswith("head_weight"):
            value = 0.25 * (1 + 0.1 * noise)
        elif key.endswith(("pos_embed", "cls_token", "dist_token")):
            value = 0.3 * noise
        elif len(shape) >= 2:
            gain = next((gain for pattern, gain in GAINS if re.search(pattern, key)), 1.0)
            rows = noise.reshape(shape[0], -1)
            value = gain * noise / np.linalg.norm(rows, axis=1).reshape(-1, *[1] * (len(shape) - 1))
        elif key.endswith("weight"):
            value = 1 + 0.1 * noise
        else:
            value = small * noise
        drawn[key] = np.asarray(value, dtype=np.float32)
    return drawn
