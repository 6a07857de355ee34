"""`posttrain push`: a saved run onto the hub, with its card and without local paths."""

import contextlib
from pathlib import Path

from posttrain.console import say, say_json
from posttrain.errors import ConfigError, EnvironmentIssue


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "push",
        help="upload a saved run with its card to the hub",
        description="Uploads the adapter or model, tokenizer, card, curves, metrics and resolved settings of a run in "
        "one commit. Optimizer states and checkpoints stay here, and no local path leaves. The repository is made if "
        "it is missing.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run, or of a checkpoint in it")
    parser.add_argument("repo", metavar="ORG/NAME", help="the repository; NAME alone is one under your own account")
    parser.add_argument("--merged", action="store_true", help="merge the adapter into its base, upload the whole model")
    parser.add_argument("--private", action="store_true", help="make the new repository private")
    parser.add_argument(
        "--base-model-id",
        "--base_model_id",
        metavar="ID",
        help="the base model's id on the hub; needed if it is local",
    )
    parser.add_argument("--message", default="Upload by posttrain", help="of the commit; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="for scripts")


def run(args) -> int:
    """Push; exit code 0 once the commit is on the hub, 2 for a bad setting, 4 where the hub cannot take it."""
    _check_folder(args.folder)

    from posttrain import quiet
    from posttrain.hub import open_repository, push_folder
    from posttrain.hub.base_model import check_repo_id, hub_base, noted_base, run_of
    from posttrain.hub.files import check_files, saved_weights
    from posttrain.hub.push import merged_weights

    if args.merged:
        quiet.quiet_libraries()
    check_repo_id("ORG/NAME", args.repo)
    if "adapter_config.json" not in saved_weights(args.folder) and args.merged:
        raise ConfigError(f"--merged is set, but {args.folder} holds a whole model. Leave --merged out.")
    check_files(args.folder, run_of(args.folder))
    noted, name = noted_base(args.folder)
    given = args.base_model_id or noted
    base = hub_base(given, name, "--base-model-id")
    try:
        # a merge that fails must leave no empty repository behind
        with merged_weights(args.folder) if args.merged else contextlib.nullcontext() as weights:
            destination = open_repository(
                args.repo, base, base_is_given=given is not None, private=args.private or None
            )
            pushed = push_folder(args.folder, destination, commit_message=args.message, weights=weights)
    except EnvironmentIssue as error:
        raise EnvironmentIssue(f"{error}\n{args.folder} is as it was. The same command pushes it again.") from error
    facts = {
        "repo": destination.repo_id,
        "commit": pushed.commit.commit_url,
        "base_model": base,
        "merged": args.merged,
        "files": pushed.files,
    }
    if args.json:
        say_json(facts)
    else:
        say(f"Pushed {len(pushed.files)} files to {destination.repo_id}: {', '.join(pushed.files)}")
        say(pushed.commit.commit_url)
    return 0


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"RUN is {folder}, which is no folder; give the folder of a saved run.")
    if any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        return
    newest = None
    # torch and TRL take seconds to load
    if any(folder.glob("checkpoint-*")):
        from posttrain.run.checkpoints import complete

        newest = next(reversed(complete(folder)), None)
    instead = f"push its newest complete checkpoint, {newest}." if newest else "give the folder of a saved run."
    raise ConfigError(f"RUN is {folder}, which holds no adapter and no model; {instead}")
