"""Several folders in one run, each with its caption, trigger word, repeats, class or role."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from image_folders import captions, labels, save, values, write
from image_sets import settings
from resuming import check_resume
from run_folders import read_metrics

import datasets_lib
from trainers.common.text_to_image.stable_diffusion import StableDiffusionTrainer


def build(tables, split="train", **changed):
    return datasets_lib.build(settings(**{"train_data_dir": tables, "caption": None, **changed}), split)


@pytest.fixture
def folders(tmp_path):
    """cat: two pictures, one with a text; dog: one picture with metadata; prior: two pictures of dogs."""
    for number, name in enumerate(("cat/a", "cat/b", "dog/c", "prior/d", "prior/e")):
        save(tmp_path / f"{name}.png", number)
    (tmp_path / "cat" / "a.txt").write_text("a cat, asleep")
    write(tmp_path / "dog" / "metadata.jsonl", {"file_name": "c.png", "text": "a dog"})
    return tmp_path


def table(folders, name, **about):
    return {"path": str(folders / name), **about}


def test_two_concepts_in_one_run(folders):
    dataset = build(
        [
            table(folders, "cat", caption="a cat", trigger_word="ohwx", repeats=3, class_name="cat"),
            table(folders, "dog", repeats=2, class_name="dog"),
        ],
        trigger_word="sks",
    )
    assert Counter(zip(values(dataset), captions(dataset), labels(dataset), strict=True)) == {
        (0, "ohwx, a cat, asleep", 0): 3,
        (1, "ohwx, a cat", 0): 3,
        (2, "sks, a dog", 1): 2,
    }
    assert (len(dataset), len(dataset.pictures), dataset.label_names) == (8, 3, ["cat", "dog"])
    assert list(dataset.captions()) == ["ohwx, a cat, asleep", "ohwx, a cat", "sks, a dog"]
    assert dataset.caption_problem is None
    assert dataset.notes[0] == f"{folders / 'cat'}: 2 images, each 3 times an epoch, trigger word 'ohwx'"


def test_tags_are_shuffled_behind_each_folders_word(folders):
    import torch

    tables = [table(folders, "cat", caption="a, b, c, d", trigger_word="ohwx"), table(folders, "dog")]
    dataset = build(tables, shuffle_tags=True)
    drawn = {dataset.get(1, torch.Generator().manual_seed(n))["caption"] for n in range(20)}
    assert len(drawn) > 5
    assert all(text.startswith("ohwx, ") and sorted(text[6:].split(", ")) == ["a", "b", "c", "d"] for text in drawn)


def test_a_fraction_is_held_out_of_all_folders(folders):
    tables = [table(folders, "cat", caption="x", repeats=3), table(folders, "dog")]
    train, held = (build(tables, split, validation_split=0.34) for split in ("train", "validation"))
    assert len(held) == 1
    assert not set(values(train)) & set(values(held))
    assert len(train) == 3 * len({0, 1} - set(values(held))) + len({2} - set(values(held)))


def test_folders_called_by_their_repeats_in_a_list(tmp_path):
    save(tmp_path / "x" / "4_cat" / "a.png", 1)
    dataset = build([{"path": str(tmp_path / "x"), "repeats": 2}], folder_repeats=True)
    assert (values(dataset), captions(dataset)) == ([1] * 8, ["cat"] * 8)


@pytest.mark.parametrize(
    "change",
    [{"caption": "a kitten"}, {"trigger_word": "sks"}, {"repeats": 2}, {"class_name": "x"}],
)
def test_what_a_table_says_is_part_of_the_fingerprint(folders, change):
    plain = build([table(folders, "cat", caption="a cat")])
    assert build([table(folders, "cat", **{"caption": "a cat", **change})]).fingerprint != plain.fingerprint
    assert build([table(folders, "cat", caption="a cat")]).fingerprint == plain.fingerprint


def test_folders_without_captions(folders):
    [*_, note] = build([table(folders, "prior"), table(folders, "dog")]).notes
    assert note == f"no captions found in {folders / 'prior'}: its images have the empty text"
    nothing = build([table(folders, "prior")])
    assert nothing.caption_note == "no captions found: every example has base.caption = ''"
    (folders / "prior" / "d.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not read: 1 .json with the names of images \(.*d.json\) \(.*prior\)"):
        datasets_lib.check_captions(build([table(folders, "prior"), table(folders, "dog")]))
    datasets_lib.check_captions(build([table(folders, "prior", caption=""), table(folders, "dog")]))


# --- pictures of the class


def test_a_folder_of_regularization_images(folders):
    dataset = build(
        [table(folders, "dog", repeats=4), table(folders, "prior", caption="a photo of a dog", regularization=True)]
    )
    examples = [dataset.get(index, None) for index in range(len(dataset))]
    assert len(examples) == 4
    assert [example["class_caption"] for example in examples] == ["a photo of a dog"] * 4
    grey = [round(float(example["class_image"].mean() + 1) * 127.5) for example in examples]
    assert grey == [3, 4, 3, 4]
    assert list(dataset.captions("class_caption")) == ["a photo of a dog"] * 2
    (folders / "prior" / "d.txt").write_text("a sleeping dog")
    dataset = build([table(folders, "dog"), table(folders, "prior", caption="a photo of a dog", regularization=True)])
    assert list(dataset.captions("class_caption")) == ["a sleeping dog", "a photo of a dog"]


def test_regularization_images_need_a_caption(folders):
    with pytest.raises(ValueError, match=r"images of the class in .*prior have no caption; give their table one"):
        build([table(folders, "dog"), table(folders, "prior", regularization=True)])


# --- what is refused


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([{"path": "a", "captoin": "x"}], "table 1 has the key 'captoin'; it may have path, .*did you mean 'caption'"),
        ([{"path": "a"}, {"caption": "x"}], "table 2 has no path; give a folder of images"),
        ([{"path": "a", "repeats": 1.5}], "table 1 has repeats = 1.5; it must be an integer"),
        ([{"path": "a", "repeats": True}], "table 1 has repeats = True; it must be an integer"),
        ([{"path": "a", "repeats": 0}], "table 1 has repeats = 0; it must be from 1 to 100,000"),
        ([{"path": 3}], "table 1 has path = 3; it must be text"),
        ([{"path": " "}], "table 1 has a blank path; leave it out"),
        ([{"path": "a", "trigger_word": ""}], "table 1 has a blank trigger_word; leave it out"),
        ([{"path": "a", "regularization": "yes"}], "table 1 has regularization = 'yes'; it must be true or false"),
        ([{"path": "a", "caption": 5}], "table 1 has caption = 5; it must be text or null"),
        ([{"path": "a", "regularization": True}], "must have a table without regularization: true, to train on"),
        ([{"path": "$HOME/x"}], "table 1 has path = '.HOME/x'; write the folder: variables of the environment are not"),
        ([], "must have a table without regularization: true, to train on"),
        (
            [{"path": "a"}, {"path": "b", "regularization": True, "repeats": 2}],
            "table 2 has repeats, which images with reg",
        ),
        ([{"path": "a", "class_name": "x"}, {"path": "b"}], "must have a class_name in all tables, or in none"),
    ],
)
def test_mistakes_in_tables(tables, message):
    found = [f"{option} {problem}" for option, problem in datasets_lib.problems(settings(train_data_dir=tables))]
    assert re.search(message, found[0]), found


def test_mistakes_that_the_folders_show(folders):
    with pytest.raises(
        ValueError, match=r"a.png in two of its folders, .*cat and .*cat; keep one, and set its repeats"
    ):
        build([table(folders, "cat", caption="x"), table(folders, "cat", caption="y")])
    with pytest.raises(
        ValueError, match="base.validation_split is 'val', but base.train_data_dir, a list, has no named"
    ):
        build([table(folders, "cat")], validation_split="val")
    with pytest.raises(FileNotFoundError, match=r"base.train_data_dir: there is no folder .*none"):
        build([table(folders, "none")])
    save(folders / "cat" / "a-masklabel.png", 9)
    save(folders / "cat" / "b-masklabel.png", 9)
    with pytest.raises(ValueError, match="has no mask; add"):
        build([table(folders, "cat", caption="x"), table(folders, "prior")], mask_files=True)
    write(folders / "dog" / "metadata.jsonl", {"file_name": "c.png", "text": "a dog", "mask": "c.png"})
    with pytest.raises(ValueError, match=r"prior has no masks, and other folders of base.train_data_dir have some"):
        build([table(folders, "dog"), table(folders, "prior")])
    with pytest.raises(ValueError, match=r"such as .*dog/c.png, are examples to train on, too"):
        build([table(folders, "dog"), table(folders, "dog", regularization=True, caption="x")])


# --- runs


def test_a_run_of_two_concepts_resumes_exactly(tiny_config, folders, monkeypatch):
    """An epoch has each picture as often as its folder says, and the class's pictures their captions."""
    seen = []
    original = StableDiffusionTrainer.compute_loss

    def compute_loss(self, batch, rng, step):
        seen.append(sorted(batch["caption"]))
        assert set(batch["class_caption"]) == {"a photo of a dog"}
        return original(self, batch, rng, step)

    monkeypatch.setattr(StableDiffusionTrainer, "compute_loss", compute_loss)
    tables = [
        table(folders, "cat", caption="a cat", trigger_word="ohwx", repeats=2),
        table(folders, "dog", repeats=4),
        table(folders, "prior", caption="a photo of a dog", regularization=True),
    ]
    options = {
        "base.dataset": None, "base.train_data_dir": tables, "base.caption": None, "base.max_train_samples": None,
        "base.train_batch_size": 2, "base.validation_split": None,
        "lora.cache_text": "memory", "lora.train_text_encoder": False, "lora.text_encoder_target_modules": None,
        "lora.learning_rate": 1e-3, "lora.validation_prompts": [],
    }  # fmt: skip
    whole, _ = check_resume(tiny_config, options, task="lora")
    epoch = Counter(text for batch in seen[:4] for text in batch)
    assert epoch == {"ohwx, a cat, asleep": 2, "ohwx, a cat": 2, "a dog": 4}
    assert len(read_metrics(whole, prefix="prior_loss")) >= 1
    from safetensors import safe_open

    with safe_open(whole / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["trigger_word"] == "ohwx"
