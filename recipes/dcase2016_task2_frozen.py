"""DCASE 2016 task 2 in HEAR's form: a linear layer on the frames of a frozen encoder (Schmid et al., ICASSP 2025).

Published onset F1 at 200 ms in percent (arXiv 2409.09546), from the strong weights: ATST-F 77.3, BEATs 58.3, fPaSST
72.0, M2D 70.1, ASiT 62.9. Not trained here. The strong weights bring the encoder, the head is new:

    python main.py train --recipe dcase2016_task2_frozen --resume_checkpoint BEATs_strong_1.pt
"""

dataset_type = "dcase2016-task2"
loss_type = "frame_bce"
fractional_targets = False
random_crops = True
freeze_backbone = True

max_epoch = 500
batch_size = 256

learning_rate = 0.2
lr_schedule = "cosine"
warm_up = 4000
weight_decay = 0.0
gradient_clip = 0.0

mixup_alpha = 0.0
spec_augment = False
