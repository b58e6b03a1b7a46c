"""PretrainedSED's students on AudioSet Strong: distillation from the ensemble of teachers (Schmid et al., ICASSP 2025).

Published psds1_macro (arXiv 2409.09546): ATST-F 45.8, BEATs 46.5, fPaSST 45.4, M2D 46.3, ASiT 46.2. Not
trained here. The weak weights bring the encoder; the ensemble's logits are Zenodo record 14626113, or from `teach`:

    python main.py train --recipe audioset_strong_student --resume_checkpoint ATST-F_weak.pt --teacher_path LOGITS.hdf5

The warm-up is 20,000 of 46,920 steps, as published. Wavmix takes its partners from the batch, other than published.
"""

dataset_type = "audioset-strong"
loss_type = "frame_bce"
touched_targets = True
distillation_weight = 0.9

max_epoch = 120
epoch_clips = 100000
batch_size = 256

learning_rate = 1e-4
lr_schedule = "cosine"
warm_up = 20000
weight_decay = 0.0
gradient_clip = 0.0
precision = "16-mixed"

augment_by = "batches"
wavmix = 0.5
wavmix_alpha = 2.0
frame_shift = 0.125
mixup_alpha = 0.2
mixup_probability = 0.3
spec_augment = False
