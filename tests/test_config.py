import re

import pytest
import yaml

import bmsn_zoo.searching
from bmsn_zoo import InputError
from bmsn_zoo.config import (
    DataConfig,
    SearchConfig,
    TrainConfig,
    about,
    build_config,
    fit_to_images,
    fit_training,
    kind_of,
    load_recipe,
    over_recipe,
    shipped_folder,
)
from bmsn_zoo.data import check_batch_size
from bmsn_zoo.run_folder import RunFolder, resolve_config
from bmsn_zoo.usage import build_parser

SEGMENT = dict(
    processes=1, threads=2, precision="fp32", device="cpu", hardware="a CPU", versions={}, commit="c", command=[]
)
each_config = pytest.mark.parametrize("config_class", [SearchConfig, TrainConfig])
SHIPPED = sorted(file.stem for file in shipped_folder("recipes").glob("*.yaml"))


def refused(config_class, **values):
    """The message with which a config refuses values."""
    with pytest.raises(InputError) as caught:
        build_config(config_class, values)
    message = str(caught.value)
    assert "\n" not in message
    return message


# every setting


@each_config
def test_defaults_are_valid(config_class):
    assert build_config(config_class, config_class().as_dict()) == config_class() == build_config(config_class, {})


@each_config
def test_every_setting_is_a_flag_with_help(config_class):
    parser = build_parser(config_class, "x")
    assert not set(vars(parser.parse_args([]))) & set(config_class.model_fields), "flags not given are absent"
    for name, field in config_class.model_fields.items():
        flag = "--" + name.replace("_", "-")
        (action,) = [action for action in parser._actions if flag in action.option_strings]
        assert len(action.help) > 8
        assert field.default is None or str(field.default) in action.help
        if kind_of(config_class, name) is bool:
            assert vars(parser.parse_args([flag])) == {**vars(parser.parse_args([])), name: True}
            assert vars(parser.parse_args([flag.replace("--", "--no-", 1)]))[name] is False
        else:
            assert vars(parser.parse_args([flag, "3"]))[name] == "3"
            assert flag in parser.format_help()


@each_config
def test_help_shows_ten_flags_and_help_all_every_one(config_class, capsys):
    first = ["dataset", "epochs", "batch-size", "seed", "model"]
    for flag, shown in (("--help", len(first) + 4), ("-h", len(first) + 4), ("--help-all", None)):
        parser = build_parser(config_class, "x", first, "example: y")
        with pytest.raises(SystemExit):
            parser.parse_args([flag])
        printed = capsys.readouterr().out
        found = {word for word in re.findall(r"--[a-z-]+", printed) if not word.startswith("--no-")}
        assert printed.endswith("example: y\n")
        assert len(found) == shown if shown else len(found) > 30, found


WRONG = {
    int: ["three", 1.5, "1.5", True, [3], {"a": 1}, float("nan"), float("inf"), "", "9" * 5000],
    float: ["a lot", True, [0.5], float("nan"), "nan", float("inf"), "inf", "", 10**400],
    bool: ["true", "yes", 1, 0, [True]],
    str: [3, 0.5, True, ["x"], {"x": 1}, 10**5000],
}


@each_config
def test_wrong_types_are_refused_ranges_and_choices_held(config_class):
    for name, field in config_class.model_fields.items():
        flag, kind = name.replace("_", "-"), kind_of(config_class, name)
        low, high, choices, _ = about(config_class, name).values()
        for value in WRONG[kind]:
            message = refused(config_class, **{name: value})
            assert message.startswith(flag + " ") and len(message) < 200
        if field.annotation is kind:
            assert refused(config_class, **{name: None}) == f"{flag} is empty: give a {kind.__name__}"
        else:
            assert getattr(build_config(config_class, {name: None}), name) is None
        assert low is not None or kind not in (int, float) or choices, "every number has a lowest value"
        for limit, beyond, problem in ((low, -1, "too small: it must be at least"), (high, 1, "too large: it must be")):
            if limit is not None:
                assert problem in refused(config_class, **{name: limit + beyond})
                assert getattr(build_config(config_class, {name: limit}), name) == limit
        if choices:
            message = refused(config_class, **{name: "other" if kind is str else 10**6})
            assert "is unknown: use" in message
            for choice in choices:
                assert str(choice) in message
                assert getattr(build_config(config_class, {name: choice}), name) == choice


def test_infinity_is_not_called_too_small():
    assert "too small" not in refused(SearchConfig, lr=float("inf"))


def test_images_have_one_or_three_channels():
    assert {build_config(DataConfig, {"in_chans": channels}).in_chans for channels in (1, 3)} == {1, 3}
    assert "in-chans" in refused(DataConfig, in_chans=2)


@pytest.mark.parametrize("text", ["1e-3", "0.001", ".001", 1e-3])
def test_numbers_may_be_text(text):
    config = build_config(SearchConfig, {"lr": text, "epochs": "12", "limit": "64", "batch_size": 32.0})
    assert config.lr == 1e-3
    assert (config.epochs, config.limit, config.batch_size) == (12, 64, 32)
    assert type(config.batch_size) is int
    assert type(build_config(SearchConfig, {"lr": 1}).lr) is float


def test_text_stays_text():
    config = build_config(TrainConfig, {"pick": "5-3-2", "dataset_revision": "1234", "dataset": "007"})
    assert (config.pick, config.dataset_revision, config.dataset) == ("5-3-2", "1234", "007")


def test_unknown_settings():
    assert "unknown setting 'learning_rate'" in refused(SearchConfig, learning_rate=0.1)
    assert refused(TrainConfig, mixture_size=4) == "unknown setting 'mixture_size': it belongs under search"
    assert "did you mean epochs?" in refused(TrainConfig, epoch=4)
    assert len(refused(TrainConfig, **{"x" * 10**6: 4})) < 200
    with pytest.raises(InputError, match="unknown setting"):
        build_config(TrainConfig, {10**5000: 3})


def test_what_was_given_is_known():
    assert build_config(TrainConfig, {"lr": 0.1, "epochs": "3"}).model_fields_set == {"lr", "epochs"}


@each_config
def test_settings_leave_out_the_environment(config_class):
    config = config_class()
    environment = set(config.as_dict()) - set(config.settings())
    assert {"mixed_precision", "threads", "workers"} <= environment
    assert not environment & {"dataset", "image_size", "limit", "seed", "flip", "epochs", "batch_size", "lr", "opt"}
    assert build_config(config_class, yaml.safe_load(yaml.safe_dump(config.as_dict()))) == config


# recipes


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        file = tmp_path / "recipe.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    return write


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
@pytest.mark.parametrize("model", ["resnet20", "resnet18", "resnet50"])
def test_recipes_like_others_and_their_small_variants(data, model):
    whole, small = (load_recipe(f"{data}-{model}{end}", SearchConfig) for end in ("", "-small"))
    assert whole["dataset"] == f"uoft-cs/{data}" and ("label_column" in whole) == (data == "cifar100")
    assert small["limit"] < 5000 and small["epochs"] <= 10 and small["opt"] == whole["opt"]
    other = load_recipe(f"cifar10-{model}", SearchConfig)
    assert {key: whole[key] for key in other.keys() - {"dataset", "recipe"}} == {
        key: other[key] for key in other.keys() - {"dataset", "recipe"}
    }


def test_published_settings_of_food101():
    search = build_config(SearchConfig, load_recipe("food101-resnet50", SearchConfig))
    assert (search.dataset, search.image_size, search.crop, search.store_size) == (
        "ethz/food101", 224, "random-resized", 256,
    )  # fmt: skip
    assert (search.mixture_size, search.epochs, search.weight_decay, search.max_sharpness) == (8, 600, 1e-3, 300)
    train = build_config(TrainConfig, load_recipe("food101-resnet50", TrainConfig))
    assert (train.epochs, train.batch_size, train.min_lr) == (90, 256, 1e-5)


@pytest.mark.parametrize(
    "text", ["like: nothing", "like: [1]", "small: 3", "small: {nothing: 3}", "small: {search: 1}"]
)
def test_bad_parts_of_recipes(recipe, text):
    with pytest.raises(InputError, match=r"^recipe "):
        load_recipe(recipe(text), SearchConfig)


@each_config
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes(name, config_class):
    by_name, file = load_recipe(name, config_class), str(shipped_folder("recipes") / f"{name}.yaml")
    assert load_recipe(file, config_class) == {**by_name, "recipe": file}
    assert build_config(config_class, by_name) != config_class()


def test_recipes_that_the_readme_and_the_defaults_need_are_shipped():
    assert {"digits-resnet20", "cifar10-resnet20", "cifar100-resnet20"} <= set(SHIPPED)
    assert load_recipe("cifar100-resnet20", TrainConfig)["label_column"] == "fine_label"


def test_published_settings_of_cifar10():
    config = build_config(SearchConfig, load_recipe("cifar10-resnet20-published", SearchConfig))
    expected = dict(
        strategy="balanced", scores="batch", draws="random", rate_decay="schedule", warmup_epochs=0,
        epochs=400, mixture_size=4, batch_size=128, lr=0.1, min_lr=0.001, momentum=0.9, weight_decay=0.0,
        max_sharpness=100, score_momentum=0.9, crop_padding=4, flip=True, opt="momentum",
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_sections_reach_their_own_command(recipe):
    file = recipe("seed: 3\nflip: no\nsearch: {lr: 1e-3, mixture_size: 2}\ntrain:\n  lr: 0.5\n")
    search = build_config(SearchConfig, load_recipe(file, SearchConfig))
    train = build_config(TrainConfig, load_recipe(file, TrainConfig))
    assert (search.seed, search.flip, search.lr, search.mixture_size) == (3, False, 1e-3, 2)
    assert (train.seed, train.flip, train.lr) == (3, False, 0.5)


@each_config
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sede: 3", "unknown setting 'sede': did you mean seed"),
        ("search: {epoch: 3}", "unknown setting 'epoch': did you mean epochs"),
        ("train: {mixture_size: 3}", "unknown setting 'mixture_size'"),
        ("search: {label_smoothing: 0.1}", "unknown setting 'label_smoothing'"),
        ("3: 4", "unknown setting 3"),
        ("qqqqqq: 3", "unknown setting 'qqqqqq': see --help"),
        ("search: 3", "search is not a mapping"),
        ("train: [lr]", "train is not a mapping"),
        ("- seed", "not a mapping"),
        ("", "not a mapping"),
        ("just text", "not a mapping"),
        ("seed: [", "not valid YAML"),
        ("a:\n\tb: 1", "not valid YAML"),
        (b"\xff\xfe\x00seed", "not valid YAML"),
        ("a: [" * 15_000, "not valid YAML"),
        ("[" * 50_000, "not valid YAML"),
        ("a: &a [1]\nb: [*a, *a]", "not valid YAML: it nests deeply, or has aliases"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("seed: !!bool x", "not valid YAML"),
        ("seed: !!int ''", "not valid YAML"),
        ("#" * 100_000, "larger than 64 KiB"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_bad_recipe(recipe, config_class, text, message):
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(recipe(text), config_class)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(5)
@pytest.mark.parametrize("value", [".nan", "-.inf", "1:" * 5000 + "1", "0x" + "f" * 9000, "2024-01-01", "!!binary 3"])
def test_recipes_hold_numbers(recipe, value):
    with pytest.raises(InputError) as caught:
        build_config(SearchConfig, load_recipe(recipe(f"search: {{lr: {value}}}"), SearchConfig))
    assert "lr" in str(caught.value) or "YAML" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_setting_of_a_command_outside_its_section_says_where_it_belongs(recipe):
    with pytest.raises(InputError, match=r"mixture_size.*search"):
        load_recipe(recipe("mixture_size: 3"), SearchConfig)


@pytest.mark.parametrize("name", ["no-such-recipe", "", "cifar10", "."])
def test_unknown_recipe_lists_those_there_are(name):
    with pytest.raises(InputError, match=r"cifar10-resnet20.*digits-resnet20") as caught:
        load_recipe(name, SearchConfig)
    assert repr(name) in str(caught.value)


# the command line


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs search.py's command line up to the search, whose config it returns, or the error message."""
    seen = []

    def search(config, output, resume):
        seen.append(config)
        raise InputError("stopped before the search")

    monkeypatch.setattr(bmsn_zoo.searching, "search", search)

    def run(*argv):
        seen.clear()
        assert bmsn_zoo.searching.main(argv) == 2
        return seen[0] if seen else capsys.readouterr().err

    return run


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(command, recipe):
    file = recipe("seed: 7\ndataset: some/set\nsearch: {epochs: 9, lr: 0.5}\n")
    config = command("--recipe", file, "--epochs", "2", "--no-flip", "--limit", "100")
    assert (config.epochs, config.flip, config.limit) == (2, False, 100)
    assert (config.seed, config.lr, config.dataset, config.recipe) == (7, 0.5, "some/set", file)
    assert (config.batch_size, config.mixture_size) == (32, 1)


def test_no_arguments_are_the_small_recipe(command):
    assert command() == build_config(SearchConfig, load_recipe("digits-resnet20", SearchConfig))
    assert command("--epochs", "2").in_chans == 1
    assert command("--dataset", "some/set") == SearchConfig(dataset="some/set")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "epochs 0 is too small"),
        (["--mixture-size", "0"], "mixture-size 0 is too small"),
        (["--epoch", "3"], "unknown argument '--epoch': did you mean --epochs?"),
        (["--learning-rate", "3"], "--learning-rate"),
        (["--mixture_size=3"], "did you mean --mixture-size?"),
        (["--lr"], "--lr"),
        (["--lr", "fast"], "lr 'fast' is not a number"),
        (["--mixed-precision", "fp8"], "mixed-precision 'fp8' is unknown"),
        (["--recipe", "none"], "recipe 'none'"),
        (["surplus"], "surplus"),
        (["--resume"], "give --output"),
        (["--seed", "-1"], "seed"),
    ],
    ids=" ".join,
)
def test_bad_command_line_is_one_line(command, argv, message):
    error = command(*argv)
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_every_setting_can_be_given_as_a_flag(command):
    values = {}
    for name, field in SearchConfig.model_fields.items():
        choices, low = about(SearchConfig, name)["choices"], about(SearchConfig, name)["low"]
        plain = {bool: not field.default, str: "text", int: 2 * int(low or 0) + 3, float: float(low or 0) + 0.5}
        values[name] = choices[0] if choices else plain[kind_of(SearchConfig, name)]
    values.update(max_macs="default", max_activations="1e6")
    for name in ("recipe", "init_from", "pretrained_from", "budget"):  # names of what is read, and a second end
        values[name] = None
    argv = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv += [f"--{flag}" if value else f"--no-{flag}"]
        elif value is not None:
            argv += [f"--{flag}", str(value)]
    assert command(*argv).as_dict() == values


# resuming


@pytest.fixture
def run_folder(tmp_path):
    """A folder of a search with some settings."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = SearchConfig(epochs=5, lr=0.2, threads=3, limit=100)
    RunFolder(folder).begin(config, SEGMENT, {})
    return folder, config


def test_resume_takes_the_settings_of_the_run(run_folder):
    folder, config = run_folder
    assert resolve_config(SearchConfig, {}, folder, True) == config
    assert resolve_config(SearchConfig, {"epochs": "5", "lr": "0.2"}, folder, True) == config


def test_resume_may_change_the_environment(run_folder):
    folder, config = run_folder
    given = {"threads": 1, "workers": 0, "mixed_precision": "no"}
    assert resolve_config(SearchConfig, given, folder, True) == config.model_copy(update=given)


def test_resume_with_other_settings_names_them_all(run_folder):
    folder, _ = run_folder
    with pytest.raises(InputError, match=r"epochs 5 \(now 6\), lr 0.2 \(now 0.1\)"):
        resolve_config(SearchConfig, {"epochs": 6, "lr": 0.1, "threads": 1}, folder, True)
    with pytest.raises(InputError, match=r"limit 100 \(now None\)"):
        resolve_config(SearchConfig, {"limit": None}, folder, True)


def test_resume_of_nothing(run_folder, tmp_path):
    folder, _ = run_folder
    with pytest.raises(InputError, match="give --output"):
        resolve_config(SearchConfig, {}, None, True)
    with pytest.raises(InputError, match="nowhere is no folder, so there is nothing to resume"):
        resolve_config(SearchConfig, {}, tmp_path / "nowhere", True)
    with pytest.raises(InputError):  # a search is no training
        resolve_config(TrainConfig, {}, folder, True)


@pytest.mark.parametrize("content", ["", "[", "just text", "- list", b"\xff\x00", "epochs: many", "[" * 30_000])
@pytest.mark.parametrize("file", ["config.yaml", "run.json"])
def test_resume_of_a_damaged_config(run_folder, content, file):
    folder, _ = run_folder
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        resolve_config(SearchConfig, {}, folder, True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("before", "after"), [("lr: 0.2", "lr: 0.1"), ("limit: 100", "limit: 99")])
def test_settings_edited_between_stop_and_resume_are_noticed(run_folder, before, after):
    folder, _ = run_folder
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("threads: 3", "threads: 1"))
    assert resolve_config(SearchConfig, {}, folder, True).threads == 1, "the environment may change"
    file.write_text(file.read_text().replace(before, after))
    with pytest.raises(InputError, match=rf"edited since the run began, {before.replace(':', '')} \(now"):
        resolve_config(SearchConfig, {}, folder, True)


def test_new_run_needs_a_folder_of_its_own(run_folder, tmp_path):
    folder, _ = run_folder
    with pytest.raises(InputError, match="already holds files"):
        resolve_config(SearchConfig, {}, folder, False)
    with pytest.raises(InputError, match="already holds files"):
        resolve_config(SearchConfig, {}, folder / "config.yaml", False)
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "new", None):
        assert resolve_config(SearchConfig, {"epochs": 3}, output, False).epochs == 3
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("images", "given", "expected"),
    [
        (50_000, {}, (1, 32, 30)),
        (50_000, {"scores": "pairs"}, (4, 32, 30)),
        (5000, {"strategy": "few-shot"}, (2, 32, 30)),
        (363, {}, (1, 32, 100)),
        (363, {"mixture_size": 2}, (2, 32, 200)),
        (363, {"batch_size": 64, "epochs": 7}, (1, 64, 7)),
        (363, {"budget": 1e12}, (1, 32, None)),
        (1437, {"mixture_size": 2, "epochs": 20, "batch_size": 64}, (2, 64, 20)),
        (5000, {}, (1, 32, 30)),
        (1_200_000, {}, (1, 32, 30)),
        (9, {}, (1, 4, 300)),
        (2, {}, (1, 2, 300)),
    ],
)
def test_settings_that_are_not_given_fit_the_number_of_images(images, given, expected):
    config = fit_to_images(build_config(SearchConfig, {"lr": 0.3, **given}), images)
    assert (config.mixture_size, config.batch_size, config.epochs) == expected
    assert config.lr == 0.3
    assert fit_to_images(config, 10**6) == config, "what was chosen is kept when a run is resumed"
    supernet_steps = (images // 2 // config.batch_size) * (config.epochs or 500) // config.mixture_size
    assert supernet_steps >= 500 or config.epochs in (300, *given.values())


def test_a_search_by_several_processes_has_enough_images_and_supernets_for_each():
    data, mixture = SearchConfig(), SearchConfig(parallel="mixture")
    assert [fit_to_images(data, 50_000, processes).batch_size for processes in (1, 2, 4, 8)] == [32, 32, 64, 128]
    for processes in range(1, 10):
        for images in (9, 100, 1437, 50_000):
            check_batch_size(fit_to_images(data, images, processes).batch_size, processes)
            training = TrainConfig(layout="4-3-3", mixup=0.2)
            check_batch_size(fit_training(training, images, processes).batch_size, processes, 2)
    chosen = fit_to_images(mixture, 50_000, 4)
    assert (chosen.batch_size, chosen.mixture_size, chosen.draws) == (32, 4, "random"), "which draws for its own alone"


def test_what_serves_layouts_fairly_is_on_where_it_can_be():
    settings = {
        "balanced": ("permutation", "cost", "supernet"),
        "darts": ("permutation", "schedule", "scratch"),
        "mcts": ("permutation", "cost", "supernet"),
        "unshared": ("permutation", "cost", "scratch"),
    }
    for strategy, expected in settings.items():
        chosen = fit_to_images(SearchConfig(strategy=strategy), 1000)
        assert (chosen.draws, chosen.rate_decay, chosen.confirm_from) == expected


def test_the_recommended_recipe_serves_other_ways_to_search_too():
    """What it says of supernets, draws and rates is what a search does by itself, which knows what goes together."""
    recipe = load_recipe("cifar10-resnet20", SearchConfig)
    for given, supernets, draws, rate in (
        ({}, 1, "permutation", "cost"),
        ({"scores": "pairs"}, 4, "permutation", "cost"),
        ({"strategy": "darts"}, 1, "permutation", "schedule"),
        ({"parallel": "mixture"}, 2, "random", "cost"),
    ):
        chosen = fit_to_images(build_config(SearchConfig, over_recipe(recipe, given)), 50_000, 2)
        assert (chosen.mixture_size, chosen.draws, chosen.rate_decay) == (supernets, draws, rate)
    given = fit_to_images(SearchConfig(draws="random", rate_decay="schedule"), 1000)
    assert (given.draws, given.rate_decay) == ("random", "schedule")


def test_trainings_of_few_images_have_smaller_batches_and_more_epochs():
    """What was given stays; sets of 1,024 images and more are trained as before."""
    for images, batch, epochs in ((10, 8, 300), (64, 8, 63), (300, 32, 56), (2000, 128, 34), (50_000, 128, 30)):
        chosen = fit_training(TrainConfig(layout="4-3-3"), images)
        assert (chosen.batch_size, chosen.epochs) == (batch, epochs), images
    given = fit_training(TrainConfig(batch_size=128, epochs=3), 64)
    assert (given.batch_size, given.epochs) == (128, 3)
