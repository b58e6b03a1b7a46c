"""AST on AudioSet, from ImageNet (Gong, Chung, Glass, Interspeech 2021, arXiv 2104.01778).

Published mAP in percent after each of the five epochs: 41.5, 43.5, 44.8, 44.9, 44.9; of the mean of the epochs' scores
46.5, of the mean of their weights 45.9. Not trained here.

    python main.py train --recipe ast_audioset --resume_checkpoint deit_base_distilled_patch16_384.pth --exp_name ast
    python main.py esm_test --esm_model_pathes workspace/runs/ast --tta_shifts 0
    python main.py weight_average --wa_folder workspace/runs/ast --wa_test True --tta_shifts 0

Other than published: no L2 of 5e-7, masked cells have the mean and not the log power 0, and mixup takes its partners
from the batch.
"""

dataset_type = "audioset"
encoder = "ast"
encoder_options = {"mean": "-4.2677393", "deviation": "4.5689974"}
loss_type = "clip_bce"
balanced_data = True

max_epoch = 5
batch_size = 12
save_top_k = 5
precision = "16-mixed"

learning_rate = 1e-5
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
