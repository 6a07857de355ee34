"""Where a run is pushed to: its name, the token, the permission and the base model, known before the first step."""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from posttrain.errors import ConfigError, EnvironmentIssue, PosttrainError
from posttrain.hub.base_model import check_repo_id, hub_base, loaded_from
from posttrain.hub.metadata import license_fields
from posttrain.log import get_logger

# Seconds before each further try. The client itself tries single requests again for some seconds.
RETRY_DELAYS = (2.0, 10.0, 60.0)
_LONGEST_WAIT = 300.0
_WITH_OPTIMIZER = ("checkpoint", "all_checkpoints")
_OUR_FAULT = (ValueError, TypeError, LookupError, AttributeError, ImportError, FileNotFoundError, PermissionError)

# Names at the top of a repository that are weights of one kind or the other, whoever wrote them
_ADAPTER = re.compile(r"adapter_config\.json|adapter_model\.(safetensors|bin)").fullmatch
_MODEL = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?").fullmatch

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Destination:
    """A repository that the token can write to, and what its card has to say about the base model.

    Attributes:
        repo_id: OWNER/NAME.
        base_model_id: the hub id of the base model.
        license: the base model's `license`, `license_name` and `license_link` on the hub, as far as it has them.
    """

    repo_id: str
    base_model_id: str
    license: dict[str, str] = dataclasses.field(default_factory=dict)


def preflight(
    args, model, *, is_adapter: bool | None = None, delays: Sequence[float] = RETRY_DELAYS
) -> Destination | None:
    """Find out before the first step whether the run can be pushed; None where `push_to_hub` is false.

    The repository is made if it is missing. The main process asks the hub, and all ranks return or raise the same.

    Args:
        args: the training arguments; `base_model_id`, if they have it, names the base model on the hub.
        model: the model, or its name or path, as given to the trainer.
        is_adapter: whether an adapter will be pushed, or a whole model; None where that is not known.
        delays: seconds before each further try where the hub cannot be reached.

    Raises:
        ConfigError: a name that cannot be, a base model without a hub id, a strategy that uploads optimizer states, or
            a repository with weights of the other kind.
        EnvironmentIssue: no token, a token that may not write there, or no connection.
    """
    request = check_push(args, model)
    if request is None:
        return None

    def opened() -> Destination:
        destination = open_repository(**request, delays=delays)
        if is_adapter is not None:
            check_kind(destination.repo_id, is_adapter, args.hub_revision, args.hub_token, delays=delays)
        return destination

    if args.world_size == 1:
        return opened()
    from accelerate.utils import broadcast_object_list

    outcome: list = [None]
    if args.process_index == 0:
        try:
            outcome[0] = opened()
        except PosttrainError as error:
            outcome[0] = error
    broadcast_object_list(outcome)
    if isinstance(outcome[0], PosttrainError):
        raise outcome[0]
    return outcome[0]


def check_push(args, model) -> dict | None:
    """Return what the hub will be asked for, None where `push_to_hub` is false; asks and writes nothing.

    Raises:
        ConfigError: as `preflight`, as far as that is known without the hub.
    """
    if not args.push_to_hub:
        return None
    strategy = getattr(args.hub_strategy, "value", args.hub_strategy)
    if strategy in _WITH_OPTIMIZER:
        raise ConfigError(
            f"hub_strategy is {strategy}, which would upload optimizer states. Set it to every_save (the weights, at "
            "each save) or end; checkpoints stay in output_dir."
        )
    return _request(args, model)


def destination_of(trainer, *, private: bool | None = None, delays: Sequence[float] = RETRY_DELAYS) -> Destination:
    """Return the destination that the preflight found, or a new one where the run was not meant to be pushed.

    `private`: of a new repository; `hub_private_repo` by default. Raises as `preflight` does. Asks the hub from this
    process only.
    """
    found = getattr(trainer, "hub_destination", None)
    model = trainer.accelerator.unwrap_model(trainer.model)
    request = _request(trainer.args, model) | ({} if private is None else {"private": private})
    return found or open_repository(**request, delays=delays)


def repo_name(args) -> str:
    """Return the repository that the training arguments name; the output folder's name by default.

    Raises:
        ConfigError: it is no name of a repository.
    """
    if args.hub_model_id is not None:
        return check_repo_id("hub_model_id", args.hub_model_id)
    return check_repo_id("hub_model_id, by default the last part of output_dir,", Path(args.output_dir).resolve().name)


def _request(args, model) -> dict:
    given = getattr(args, "base_model_id", None)
    return {
        "name": repo_name(args),
        "base_model_id": hub_base(given, loaded_from(model)),
        "base_is_given": given is not None,
        "private": args.hub_private_repo,
        "token": args.hub_token,
    }


def open_repository(
    name: str,
    base_model_id: str,
    *,
    base_is_given: bool = True,
    private: bool | None = None,
    token: str | None = None,
    delays: Sequence[float] = RETRY_DELAYS,
) -> Destination:
    """Make the repository, or make sure that the token can write to it, and look up the base model.

    Args:
        name: NAME or OWNER/NAME; the token's own account is the default owner.
        base_model_id: the hub id of the base model.
        base_is_given: whether a person named it; one that was inferred must be on the hub.
        private: make a new repository private; refuse an existing public one.
        token: the one to use instead of HF_TOKEN or the stored login.
        delays: seconds before each further try.

    Raises:
        ConfigError: the base model was inferred and is not on the hub, or `private` is not how the repository is.
        EnvironmentIssue: no token, a token that may not write there, or no connection.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)

    def account():
        try:
            return api.whoami()
        except HfHubHTTPError as error:
            # This one question is rationed; a full name does not need its answer.
            if error.response.status_code == 429 and "/" in name:
                return {}
            raise

    def create() -> bool:
        try:
            api.create_repo(repo_id, private=private)
            return True
        except HfHubHTTPError as error:
            refused = error.response.status_code
            if refused not in (401, 402, 403, 409):
                raise
            try:
                # A token may be allowed to write to a repository and not to make one.
                api.auth_check(repo_id, write=True)
            except HfHubHTTPError as check:
                raise (check if refused == 409 else error) from None
            return False

    def base_card():
        try:
            card = api.model_info(base_model_id, expand=["cardData"]).card_data
            return card.to_dict() if card else {}
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403, 404):
                return None
            raise

    user = with_retries(account, name, delays)
    repo_id = name if "/" in name else f"{user['name']}/{name}"
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise EnvironmentIssue(
            f"the hub's token can only read, and {repo_id} is to be written. Make one that can write at "
            "https://huggingface.co/settings/tokens and log in with `hf auth login`, or set HF_TOKEN."
        )
    is_new = with_retries(create, repo_id, delays)
    if private and not is_new and not with_retries(lambda: api.model_info(repo_id).private, repo_id, delays):
        raise ConfigError(
            f"{repo_id} is on the hub already and is public, and a private one was asked for. Make it private in its "
            "settings there, or choose another name."
        )
    card = with_retries(base_card, repo_id, delays)
    if card is None and not base_is_given:
        raise ConfigError(
            f"the base model {base_model_id} is not on the hub, or not for this token. If it is a local folder, set "
            "base_model_id to the hub's id of the model that it is, or was made from: ORG/NAME."
        )
    if card is None:
        get_logger().warning("the base model %s is not on the hub, or not for this token", base_model_id)
    return Destination(repo_id, base_model_id, license_fields(card or {}))


def check_kind(
    repo_id: str,
    is_adapter: bool,
    revision: str | None = None,
    token: str | None = None,
    *,
    delays: Sequence[float] = RETRY_DELAYS,
) -> None:
    """Refuse to put an adapter beside a whole model in a repository, or the reverse: loaders would take both.

    Raises:
        ConfigError: the repository holds the other kind.
        EnvironmentIssue: the hub cannot be asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    def names() -> list[str]:
        try:
            found = HfApi(token=token).model_info(repo_id, revision=revision, expand=["siblings"])
        except RevisionNotFoundError:
            return []
        return [file.rfilename for file in found.siblings or []]

    others = [name for name in with_retries(names, repo_id, delays) if (_MODEL if is_adapter else _ADAPTER)(name)]
    if others:
        kinds = ("an adapter", "a whole model") if is_adapter else ("a whole model", "an adapter")
        raise ConfigError(
            f"{repo_id} holds {kinds[1]} ({', '.join(sorted(others)[:3])}), and {kinds[0]} is to be pushed. "
            "transformers would load the two together, and the card would tell of one. Push to another repository, or "
            "delete those files there first."
        )


def with_retries(call: Callable[[], Result], repo_id: str, delays: Sequence[float] = RETRY_DELAYS) -> Result:
    """Tell what `call()` returns; after a failure that may pass, again after each of `delays` (seconds).

    Raises:
        EnvironmentIssue: in words, what the hub or the connection answered last.
    """
    for delay in (*delays, None):
        try:
            return call()
        except PosttrainError:
            raise
        except Exception as error:
            text, passes, wait = _diagnosis(error, repo_id)
            if delay is None or not passes:
                raise EnvironmentIssue(text) from error
            wait = min(max(delay, wait), _LONGEST_WAIT)
            get_logger().warning("%s Trying again in %.3g s.", text, wait)
            time.sleep(wait)


def _diagnosis(error: Exception, repo_id: str) -> tuple[str, bool, float]:
    """Tell what went wrong in words, whether it may pass by itself, and the seconds that the hub asks to wait."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if getattr(response, "status_code", None):
            return _answer(cause, response, repo_id)
        if isinstance(cause, OfflineModeIsEnabled):
            return "the hub is switched off by HF_HUB_OFFLINE=1; unset it to push.", False, 0
        if isinstance(cause, LocalTokenNotFoundError):
            return "there is no token for the hub. Log in with `hf auth login`, or set HF_TOKEN.", False, 0
        error, cause = cause, cause.__cause__
    what = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    # A hub that stumbles answers with a page where the client expects JSON.
    if isinstance(error, _OUR_FAULT) and type(error).__name__ != "JSONDecodeError":
        return f"the upload to {repo_id} cannot be prepared ({what}).", False, 0
    return f"the connection to the hub broke ({what}).", True, 0


def _answer(error, response, repo_id: str) -> tuple[str, bool, float]:
    status = response.status_code
    said = "; ".join((getattr(error, "server_message", None) or str(error).strip().split("\n")[0]).splitlines())
    if status == 401:
        return (
            "the hub does not accept the token (401). Log in with `hf auth login`, or set HF_TOKEN to one that can "
            f"write to {repo_id}.",
            False,
            0,
        )
    if status == 403:
        return (
            f"the token may not write to {repo_id} (403: {said}). Use a token with write access to it, or a name under "
            "an account or organisation that you can write to.",
            False,
            0,
        )
    if status == 404:
        return f"{repo_id} is not on the hub, or not for this token (404).", False, 0
    if status == 409:
        return f"another change to {repo_id} came in between (409: {said}).", True, 0
    if status == 429 or status >= 500 or status == 408:
        wait = response.headers.get("Retry-After", "")
        return f"the hub answered {status} ({said}).", True, float(wait) if wait.isdigit() else 0
    return f"the hub refuses the upload to {repo_id} ({status}: {said}).", False, 0
