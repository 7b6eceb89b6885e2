"""Hugging Face's common tests for models, backbones, configurations and pipelines, run on the classes of this package.

These tests are only in transformers' source distribution. TIMM_EPS_TRANSFORMERS_TESTS names the unpacked root of the
installed version's distribution; without this variable the tests are skipped:

    pip download --no-deps --no-binary=transformers "transformers==$VERSION" && tar xf "transformers-$VERSION.tar.gz"
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import sys
import tempfile
import types
import unittest
from itertools import pairwise
from pathlib import Path
from typing import ClassVar
from unittest import mock

import pytest
import torch
import transformers
from conftest import SLOTS
from PIL import Image
from transformers import pipeline
from transformers.models.auto import modeling_auto

from timm_eps import EpsResNetConfig, EpsResNetForImageClassification, EpsResNetModel
from timm_eps.hf.modeling_eps_resnet import EpsResNetBackbone
from timm_eps.hf.pretrained_eps_resnet import EpsResNetPreTrainedModel

SOURCE = os.environ.get("TIMM_EPS_TRANSFORMERS_TESTS")
if not SOURCE:
    pytest.skip(
        "TIMM_EPS_TRANSFORMERS_TESTS does not name an unpacked source distribution of transformers",
        allow_module_level=True,
    )
FOUND = re.search(r'__version__ = "(.+?)"', (Path(SOURCE) / "src/transformers/__init__.py").read_text())
if FOUND is None or FOUND[1] != transformers.__version__:
    pytest.skip(
        f"{SOURCE} holds transformers {FOUND and FOUND[1]}, but {transformers.__version__} is installed",
        allow_module_level=True,
    )
pytest.importorskip("parameterized", reason="transformers' tests need parameterized")


class _Marks:
    """``pytest.mark`` for names that --strict-markers refuses. transformers selects tests by these marks."""

    def __init__(self, marks) -> None:
        self._marks = marks

    def __getattr__(self, name: str):
        try:
            return getattr(self._marks, name)
        except pytest.fail.Exception:
            return _unmarked


def _unmarked(*args, **kwargs):
    """Handles ``@mark.x`` and ``@mark.x(...)``."""
    return args[0] if args and callable(args[0]) else _unmarked


def _stub(name: str, **content) -> None:
    sys.modules[f"transformers_tests.{name}"] = module = types.ModuleType(f"transformers_tests.{name}")
    module.__dict__.update(content)


def _load(summary: dict) -> types.SimpleNamespace:
    """Load the distribution's ``tests`` as a package of another name. It uses relative imports."""
    package = sys.modules["transformers_tests"] = types.ModuleType("transformers_tests")
    package.__path__ = [str(Path(SOURCE) / "tests")]
    # The distribution has only the files of tests/, not its folders. These two mixins test text models and exporters to
    # other frameworks; tests/test_export.py tests our exports.
    _stub("exporters")
    _stub("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stub("generation")
    _stub("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    # Values other than the defaults, for the fields that every configuration has.
    common = dict(
        return_dict=False,
        output_hidden_states=True,
        dtype="float16",
        chunk_size_feed_forward=5,
        architectures=["EpsResNetModel"],
        id2label={0: "label"},
        label2id={"label": "0"},
        problem_type="regression",
    )
    _stub("utils")
    _stub("utils.test_configuration_utils", config_common_kwargs=common)
    with (
        tempfile.TemporaryDirectory() as models,
        mock.patch("pytest.mark", _Marks(pytest.mark)),
        # These helpers would run transformers/__init__.py a second time.
        mock.patch("transformers.utils.direct_transformers_import", return_value=transformers),
        mock.patch.dict(os.environ, TRANSFORMERS_TINY_MODEL_PATH=models),
    ):
        (Path(models) / "reports").mkdir()
        (Path(models) / "reports/tiny_model_summary.json").write_text(json.dumps(summary))
        names = ("backbone_common", "configuration_common", "modeling_common", "pipeline_mixin")
        return types.SimpleNamespace(
            **{name: importlib.import_module(f"transformers_tests.test_{name}") for name in names}
        )


PROCESSED = {"tokenizer_classes": [], "processor_classes": ["TimmWrapperImageProcessor"]}
common = _load({"EpsResNetModel": PROCESSED, "EpsResNetForImageClassification": PROCESSED})


class ATester:
    """A small network and its input, under the names that the common tests use."""

    is_training = True
    num_labels = 3
    batch_size = 5

    def __init__(self, image_size: int, **fields) -> None:
        self.image_size = image_size
        self.fields = fields

    def get_config(self) -> EpsResNetConfig:
        return EpsResNetConfig(num_labels=self.num_labels, **copy.deepcopy(self.fields))

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, 3, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": common.modeling_common.floats_tensor(shape)}


class ModelTests(common.modeling_common.ModelTesterMixin):
    all_model_classes = (EpsResNetModel, EpsResNetForImageClassification, EpsResNetBackbone)
    has_attentions = False
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True  # the test looks for a year, which our files do not have

    def setUp(self):
        # The registries of transformers' own models, which the tests read.
        kind = EpsResNetConfig.model_type
        for names, model_class in (
            ("MODEL_MAPPING_NAMES", EpsResNetModel),
            ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", EpsResNetForImageClassification),
            ("MODEL_FOR_BACKBONE_MAPPING_NAMES", EpsResNetBackbone),
        ):
            self.patched(mock.patch.dict(getattr(modeling_auto, names), {kind: model_class.__name__}))

    def patched(self, patch) -> None:
        patch.start()
        self.addCleanup(patch.stop)

    def test_config(self):
        tester = common.configuration_common.ConfigTester(
            self,
            config_class=EpsResNetConfig,
            has_text_modality=False,
            common_properties=["num_labels", "num_hidden_layers"],
            **self.model_tester.fields,
        )
        tester.run_common_tests()

    def test_can_init_all_missing_weights(self):
        # The test makes the same exception for transformers' own timm wrapper: timm initialises its network when it
        # builds it, from another place in the random sequence. All else is compared.
        self.patched(
            mock.patch.object(
                common.modeling_common,
                "find_parent_traceback",
                lambda name, model: (name, "", "TimmWrapperPreTrainedModel"),
            )
        )
        super().test_can_init_all_missing_weights()

    def test_batching_equivalence(self):
        # Sums for a single image run in another order, and activations grow from block to block in an untrained
        # network.
        super().test_batching_equivalence(atol=1e-4, rtol=1e-4)

    def test_hidden_states_output(self):
        """One map of the stem and one per stage, each as wide as the one before or half as wide."""
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            for asked in ({"output_hidden_states": True}, {}):
                config.output_hidden_states = not asked
                model = model_class(config).eval()
                with torch.no_grad():
                    hidden_states = model(**inputs, **asked).hidden_states
                assert len(hidden_states) == len(config.stage_names)
                for one, following in pairwise(hidden_states):
                    assert one.shape[-1] // following.shape[-1] in (1, 2)

    def test_model_weights_reload_no_missing_tied_weights(self):
        # Without any weights transformers returns a random network; from_pretrained of this package refuses.
        with pytest.raises(ValueError, match=r"model\.safetensors does not fit .* it lacks '"):
            super().test_model_weights_reload_no_missing_tied_weights()

    @unittest.skip("The input is an image: there are no embeddings")
    def test_model_get_set_embeddings(self):
        pass


class EpsResNetTest(ModelTests, unittest.TestCase):
    """With side supervision, as in a training checkpoint: saving and loading keep the side head."""

    model_tester = ATester(16, architecture="eps_resnet20")
    test_missing_keys = False  # the base model is timm's network, which does not save itself
    test_mismatched_shapes = False  # the test takes the side head for the classifier

    def setUp(self):
        super().setUp()
        self.patched(mock.patch.object(EpsResNetPreTrainedModel, "keeps_training_parts", True))


class PrunedTest(ModelTests, unittest.TestCase):
    model_tester = ATester(16, architecture="eps_resnet20", side_loss_weight=0.0, model_args={"removed": [*SLOTS[::2]]})


class TwinTest(ModelTests, unittest.TestCase):
    model_tester = ATester(32, architecture="eps_test_resnet")


class BackboneTest(common.backbone_common.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (EpsResNetBackbone,)
    config_class = EpsResNetConfig
    has_attentions = False
    model_tester = ATester(16, architecture="eps_resnet20", out_features=["stem", "stage1", "stage3"])


class PrunedTwinBackboneTest(BackboneTest):
    model_tester = ATester(
        32,
        architecture="eps_test_resnet",
        model_args={"removed": ["layer2.0.drop_path"]},
        out_features=["stage1", "stage2", "stage3"],
    )


class ImageClassificationPipelineTests(unittest.TestCase):
    """Replaces tests/pipelines, which the distribution lacks, with generated pictures. The name is transformers'."""

    __test__ = False  # the mixin calls it

    def get_test_pipeline(self, model, tokenizer, image_processor, dtype):
        made = pipeline("image-classification", model=model, image_processor=image_processor, dtype=dtype, top_k=2)
        return made, [Image.effect_noise((20, 30), 90).convert(mode) for mode in ("RGB", "RGBA", "LA", "L")]

    def run_pipeline_test(self, made, examples):
        answers = made(examples, batch_size=2)
        assert [len(answer) for answer in answers] == [2] * len(examples)
        for answer in answers:
            for one in answer:
                assert isinstance(one["label"], str)
                assert 0 < one["score"] < 1


class ImageFeatureExtractionPipelineTests(ImageClassificationPipelineTests):
    def get_test_pipeline(self, model, tokenizer, image_processor, dtype):
        made = pipeline("image-feature-extraction", model=model, image_processor=image_processor, dtype=dtype)
        return made, [Image.effect_noise((20, 30), 90).convert(mode) for mode in ("RGB", "RGBA", "LA", "L")]

    def run_pipeline_test(self, made, examples):
        assert torch.tensor(made(examples)).shape == (len(examples), 1, 64, 8, 8)


class PipelineTest(common.pipeline_mixin.PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping: ClassVar = {
        "image-classification": EpsResNetForImageClassification,
        "image-feature-extraction": EpsResNetModel,
    }

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        config = ATester(16, architecture="eps_resnet20", model_args={"removed": [*SLOTS[::2]]}).get_config()
        for model_class in cls.pipeline_model_mapping.values():
            model_class(config).save_pretrained(Path(folder.name) / config.model_type / model_class.__name__)
        mixin = common.pipeline_mixin
        tests = {
            task: {"test": f"{__name__}.{mixin.pipeline_test_mapping[task]['test'].rpartition('.')[2]}"}
            for task in cls.pipeline_model_mapping
        }
        for patch in (
            mock.patch.object(mixin, "TRANSFORMERS_TINY_MODEL_PATH", folder.name),
            mock.patch.dict(mixin.pipeline_test_mapping, tests),
        ):
            patch.start()
            cls.addClassCleanup(patch.stop)
