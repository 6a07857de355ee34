"""What upstream, and checks of rows, do again in each of a thousand tiny runs, and what no test of a run looks at."""

import copy
import functools
import json
import sys

# what `spare` replaces of `datasets`, by module and name
HASHED = {}


def spare(patch) -> None:
    """Have data sets numbered instead of hashed, which is a tenth of a tiny run, and no model looked through for parts
    that were compiled, which no test does."""
    if "datasets" in sys.modules:
        from datasets import arrow_dataset, fingerprint

        stand_ins = dict.fromkeys(("generate_fingerprint", "update_fingerprint"), _number)
        for module in (arrow_dataset, fingerprint):
            for name, stand_in in stand_ins.items():
                HASHED.setdefault((module, name), getattr(module, name))
                patch.setattr(module, name, stand_in)
        HASHED.setdefault((fingerprint, "format_kwargs_for_fingerprint"), fingerprint.format_kwargs_for_fingerprint)
        patch.setattr(fingerprint, "format_kwargs_for_fingerprint", lambda *args, **kwargs: {})
    if "accelerate" in sys.modules:
        from accelerate.utils import other

        patch.setattr(other, "has_compiled_regions", lambda module: False)


def _number(*args) -> str:
    from datasets import fingerprint

    return fingerprint.generate_random_fingerprint()


# what was found of rows, by them and by what renders them
_FOUND = {}


def check_rows_once(patch) -> None:
    """Have rows that were found to be in order checked no second time with the same tokenizer."""
    row_checks = sys.modules.get("posttrain.data.rendering.row_checks")
    if row_checks is None:
        return
    check = row_checks.check

    @functools.wraps(check)
    def once(dataset, processing_class, *args, **kwargs):
        key = _key(dataset, processing_class, args, kwargs)
        if key is None:
            return check(dataset, processing_class, *args, **kwargs)
        if key not in _FOUND:
            _FOUND[key] = check(dataset, processing_class, *args, **kwargs)
        return copy.deepcopy(_FOUND[key])

    patch.setattr(row_checks, "check", once)


def _key(dataset, tokenizer, args, kwargs):
    """All that the check reads; None of what is no small set of rows with a tokenizer of `tokenizers`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(dataset, "to_list") or len(dataset) > 64:
        return None
    named = {name: getattr(tokenizer, name, None) for name in ("chat_template", "add_eos_token", "add_bos_token")}
    named |= dict(special=tokenizer.special_tokens_map, settings=tokenizer.init_kwargs, kind=repr(type(tokenizer)))
    return json.dumps([dataset.to_list(), str(dataset.features), named, args, kwargs], default=str), backend.to_str()
