"""AST on AudioSet's balanced set, from ImageNet (Gong, Chung, Glass, Interspeech 2021, arXiv 2104.01778).

Published mAP in percent: 33.15 in the loop of AudioTagging Done Right (Interspeech 2022, arXiv 2203.13448); 35.0 of the
mean of the weights of epochs 6 to 25, with PSLA's enhanced labels. Not trained here.

    python main.py train --recipe ast_audioset_balanced --resume_checkpoint deit_base_distilled_patch16_384.pth
    python main.py weight_average --wa_epochs 6,25 --wa_test True --dataset_type audioset --tta_shifts 0

Other than published: no L2 of 5e-7, masked cells have the mean and not the log power 0, and mixup takes its partners
from the batch.
"""

dataset_type = "audioset"
index_type = "balanced_train"
encoder = "ast"
encoder_options = {"mean": "-4.2677393", "deviation": "4.5689974"}
loss_type = "clip_bce"
balanced_data = False

max_epoch = 25
batch_size = 12
save_top_k = 25
precision = "16-mixed"

learning_rate = 5e-5
lr_schedule = "milestones"
warm_up = 1000
lr_milestones = [10, 15, 20, 25]
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
