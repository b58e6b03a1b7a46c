"""DCASE 2016 task 2 in HEAR's form, fine-tuned by PretrainedSED (Schmid et al., ICASSP 2025, arXiv 2409.09546).

Published onset F1 at 200 ms in percent, from the strong weights: ATST-F 92.9, BEATs 84.7, fPaSST 88.8, M2D 84.8, ASiT
84.1. Not trained here. The strong weights bring the encoder, the head is new:

    python main.py train --recipe dcase2016_task2 --resume_checkpoint ATST-F_strong_1.pt

As published, the warm-up of 4,000 steps outlasts the run (`--warm_up 0.1` ends), and an epoch takes 12 random stretches
of each recording, here one from each of its 12 clips on. Other than published, biases and norms have no weight decay.
"""

dataset_type = "dcase2016-task2"
loss_type = "frame_bce"
fractional_targets = False
random_crops = True

max_epoch = 300
batch_size = 256

learning_rate = 1.06e-4
layer_decay = 0.95
lr_schedule = "cosine"
warm_up = 4000
weight_decay = 1e-3
decay_matrices_only = True
gradient_clip = 0.0

augment_by = "batches"
wavmix = 0.5
wavmix_alpha = 0.2
mixup_alpha = 0.2
mixup_probability = 0.5
spec_augment = False
