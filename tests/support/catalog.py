"""A small catalog of the shape that `python -m defeat.engine.catalog` writes."""

from typing import Any

BACKBONES = ["timm/resnet10t", "timm/mobilenetv3_small_050", *(f"timm/made_up_{number}" for number in range(30))]

DETECTOR: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["backbone"],
    "properties": {
        "architecture": {"const": "faster_rcnn", "default": "faster_rcnn", "type": "string"},
        "backbone": {"type": "string", "enum": BACKBONES, "description": "Backbone by name."},
        "strides": {
            "type": "array",
            "items": {"type": "integer", "enum": [4, 8, 16, 32]},
            "minItems": 1,
            "maxItems": 4,
            "default": [4, 8, 16, 32],
            "x-decides": ["levels", "tensors"],
        },
        "pyramid_channels": {
            "type": "integer",
            "minimum": 8,
            "maximum": 1024,
            "default": 256,
            "x-decides": ["channels", "tensors"],
        },
        "batch_norm_epsilon": {
            "anyOf": [{"type": "number", "minimum": 0, "maximum": 0.1}, {"type": "null"}],
            "default": None,
        },
    },
}

TEACHER_DETECTOR = {
    "architecture": "faster_rcnn",
    "backbone": "timm/resnet10t",
    "strides": [4, 8, 16, 32],
    "pyramid_channels": 64,
    "batch_norm_epsilon": None,
}

CATALOG: dict[str, Any] = {
    "format_version": 2,
    "detectors": {
        "faster_rcnn": {
            "summary": "Two stages.",
            "head": "two_stage",
            "provides": ["backbone", "anchors"],
            "channels": [],
            "anchors": None,
            "rounds": None,
            "normalizes_coarsest_map": False,
            "schema": DETECTOR,
        }
    },
    "pretrained": {
        "fasterrcnn_resnet50_fpn": {
            "detector": TEACHER_DETECTOR,
            "weights": {"COCO_V1": {"classes": ["person", "car"]}},
        }
    },
    "backbones": {
        name: {
            "strides": [4, 8, 16, 32],
            "channels": [64, 64, 128, 256],
            "layouts": [f"{name} up to {stride}" for stride in (4, 8, 16, 32)],
            "parameters": 5,
            "rounds": "up",
        }
        for name in BACKBONES
    },
    "methods": {
        "defeat": {
            "summary": "Decoupled features.",
            "needs": ["neck"],
            "weights": ["neck_object_weight"],
            "needs_teacher": True,
            "head_weights": [],
            "backbone_weights": [],
            "logit_weights": [],
            "backbone_strides": [],
            "schema": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "method": {"const": "defeat", "default": "defeat", "type": "string"},
                    "neck_object_weight": {"type": "number", "minimum": 0, "default": 4.0},
                    "temperature": {"type": "number", "exclusiveMinimum": 0, "default": 1.0},
                    "mask": {"type": "string", "enum": ["paper", "cover"], "default": "paper"},
                },
            },
        },
        "hints": {
            "summary": "Two parts.",
            "needs": ["neck", "student.anchors"],
            "weights": [],
            "needs_teacher": True,
            "head_weights": [],
            "backbone_weights": [],
            "logit_weights": ["logits_weight"],
            "backbone_strides": [],
            "schema": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "method": {"const": "hints", "default": "hints", "type": "string"},
                    "logits_weight": {"type": "number", "minimum": 0, "default": 0.0},
                },
            },
        },
        "baseline": {
            "summary": "No distillation.",
            "needs": [],
            "weights": [],
            "needs_teacher": False,
            "head_weights": [],
            "backbone_weights": [],
            "logit_weights": [],
            "backbone_strides": [],
            "schema": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"method": {"const": "baseline", "default": "baseline", "type": "string"}},
            },
        },
    },
    "combination": {
        "schema": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"weight": {"type": "number", "exclusiveMinimum": 0, "maximum": 1000, "default": 1.0}},
        }
    },
    "schedule": {
        "schema": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "epochs": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 12},
                "batch_size": {"type": "integer", "minimum": 1, "default": 8},
                "accumulation": {"type": "integer", "minimum": 1, "default": 1},
            },
            "x-rules": [{"key": "accumulation", "rule": "divides", "other": "batch_size"}],
        }
    },
    "evaluation": {
        "schema": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "split": {"type": "string", "enum": ["val", "test", "train"], "default": "val"},
                "every_epochs": {"type": "integer", "minimum": 1, "default": 1},
            },
        }
    },
    "augmentation": {
        "schema": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "horizontal_flip": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5},
                "scale_min": {"type": "number", "exclusiveMinimum": 0, "default": 1.0},
                "scale_max": {"type": "number", "exclusiveMinimum": 0, "default": 1.0},
            },
        }
    },
    "resources": {
        "schema": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "gpus": {"type": "integer", "minimum": 1, "maximum": 64, "default": 1},
                "gpu_memory_gb": {
                    "anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 10000}, {"type": "null"}],
                    "default": None,
                },
                "label": {
                    "anyOf": [{"type": "string", "pattern": "^[A-Za-z0-9._-]{1,50}$"}, {"type": "null"}],
                    "default": None,
                },
            },
        }
    },
    "dataset_formats": {"voc": {"summary": "Pascal VOC."}, "coco": {"summary": "COCO."}},
}
