"""PSLA (EfficientNet-B2) on AudioSet, in the loop of AudioTagging Done Right (Interspeech 2022, arXiv 2203.13448).

Published: the settings, without a figure for them; their network took the softmax over the classes, by mistake, and
this one takes sigmoids. The weights of ImageNet are those of timm's tf_efficientnet_b2. Not trained here.

    python main.py train --recipe psla_audioset --resume_checkpoint tf_efficientnet_b2.safetensors
    python main.py test --resume_checkpoint workspace/runs/htsat_audioset/checkpoints/best.ckpt --tta_shifts 0

Other than published: no L2 of 5e-7, masked cells have the mean and not the log power 0, and mixup takes its partners
from the batch.
"""

dataset_type = "audioset"
encoder = "psla"
encoder_options = {"mean": "-3.3458831", "deviation": "4.1563106"}
loss_type = "clip_bce"
balanced_data = True

max_epoch = 10
batch_size = 64
save_top_k = 10
precision = "32"

learning_rate = 6e-5
lr_schedule = "milestones"
warm_up = 1000
lr_milestones = [2, 3, 4, 5, 6, 7, 8, 9, 10]
lr_factor = 0.5
adam_beta1 = 0.95
weight_decay = 0.0
gradient_clip = 0.0

mixup_alpha = 0.0
wavmix = 0.5
wavmix_alpha = 10.0
spec_augment = True
spec_masks = 1
spec_mask_frames = 192
spec_mask_bands = 48
