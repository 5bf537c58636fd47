"""Trained segmentation models, which smp loads from their folders."""

from .checkpoint import SegmentationCheckpoint, add_checkpoints

CHECKPOINTS: tuple[SegmentationCheckpoint, ...] = (
    SegmentationCheckpoint(
        name="deeplabv3plus_resnet18_poolskip.camvid_r180",
        dataset="camvid",
        sha256="6cba3107fadf0362e666e59ac95fe16132b2a8356db97f863e4efed5890609fe",
        metrics={"miou": 44.8489, "pixel_accuracy": 82.5695},
        recipe="deeplabv3plus_resnet18_poolskip.camvid_r180",
        seed=0,
        hardware="Intel(R) Xeon(R) Processor (CPU, 1 thread)",
        hours=1.727,
        images_per_second=3.1,
        torch="2.15.0",
        model_args={"encoder_name": "resnet18_poolskip"},
        base_scores={"miou": 44.2762, "pixel_accuracy": 81.5613, "hours": 1.204, "images_per_second": 4.6},
        model="deeplabv3plus",
        image_size=180,
        class_iou=(88.63, 67.85, 5.74, 87.39, 60.09, 59.61, 14.96, 10.87, 64.49, 17.44, 16.26),
    ),
    SegmentationCheckpoint(
        name="unet_resnet18_poolskip.camvid_r180",
        dataset="camvid",
        sha256="",
        metrics={"miou": 42.8748, "pixel_accuracy": 81.1938},
        recipe="unet_resnet18_poolskip.camvid_r180",
        seed=0,
        hardware="AMD EPYC (CPU, 1 thread)",
        hours=1.028,
        images_per_second=5.2,
        torch="2.15.0",
        model_args={"encoder_name": "resnet18_poolskip"},
        base_scores={"miou": 42.4476, "pixel_accuracy": 82.4996, "hours": 0.749, "images_per_second": 7.2},
        model="unet",
        image_size=180,
        class_iou=(89.13, 68.82, 3.93, 82.25, 47.5, 59.22, 20.26, 9.66, 62.92, 19.12, 8.82),
    ),
    SegmentationCheckpoint(
        name="segnet_vgg11_bn_poolskip.camvid_r180",
        dataset="camvid",
        sha256="",
        metrics={"miou": 20.1643, "pixel_accuracy": 63.4303},
        recipe="segnet_vgg11_bn_poolskip.camvid_r180",
        seed=0,
        hardware="Intel(R) Xeon(R) Processor (CPU, 1 thread)",
        hours=1.084,
        images_per_second=1.1,
        torch="2.15.0",
        model_args={"encoder_name": "vgg11_bn_poolskip"},
        base_scores={"miou": 23.4112, "pixel_accuracy": 67.9125, "hours": 1.276, "images_per_second": 2.2},
        model="segnet",
        image_size=180,
        class_iou=(85.3, 46.61, 0.0, 67.62, 3.92, 3.09, 0.0, 0.0, 15.26, 0.0, 0.0),
    ),
)

add_checkpoints(CHECKPOINTS)
