"""PretrainedSED's teachers on AudioSet Strong (Schmid et al., ICASSP 2025, arXiv 2409.09546).

Published psds1_macro with two BiGRU layers of 2048, as here: ATST-F 43.3, BEATs 45.8, fPaSST 43.3, M2D 44.1, ASiT
43.3; without (`--sequence_head none`): 41.8, 44.1, 40.7, 41.1, 40.9. Not trained here. The weak weights bring the
encoder:

    python main.py train --recipe audioset_strong --resume_checkpoint atst-f-weak

As published, the warm-up of 20,000 steps outlasts the 11,730 of the run: the rate rises to 4.1e-5 and never falls
(`--warm_up 0.1` ends). Clips are drawn without replacement from hardly more than an epoch takes. Other than
published, wavmix takes its partners from the batch, and every epoch is validated.
"""

dataset_type = "audioset-strong"
loss_type = "frame_bce"
touched_targets = True
sequence_head = "gru"
sequence_layers = 2
sequence_dim = 2048

max_epoch = 30
epoch_clips = 100000
batch_size = 256
balanced_data = True
balanced_by = "active_frames"
balanced_replacement = False

learning_rate = 7e-5
lr_schedule = "cosine"
warm_up = 20000
weight_decay = 0.0
gradient_clip = 0.0
precision = "16-mixed"

augment_by = "batches"
wavmix = 1.0
wavmix_alpha = 2.0
frame_shift = 0.125
mixup_alpha = 0.2
mixup_probability = 0.3
mix_style = 0.3
mix_style_alpha = 0.4
filter_augment = 6.0
filter_probability = 0.8
frequency_warp = 0.4
warp_probability = 0.8
spec_augment = False
