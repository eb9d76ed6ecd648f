"""Worker of official.py; runs in the environment of the official implementation.

Prints torch's version first. Then reads one task per line (train, sample, or product with m, k and n),
runs it once and answers with its seconds, as JSON. Needs torch and the imports of the official code, not
this project.
"""

import argparse
import contextlib
import copy
import json
import sys
import time
import types

import torch
import torch.nn.functional as F


def equal_length_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """Compute flash_attn_varlen_func exactly: SDPA for each run of sequences of equal length."""
    ends = cu_seqlens_q.tolist()
    lengths = [end - begin for begin, end in zip(ends[:-1], ends[1:], strict=True)]
    out, first = torch.empty_like(q), 0
    while first < len(lengths):
        last = first
        while last < len(lengths) and lengths[last] == lengths[first]:
            last += 1
        rows = slice(ends[first], ends[last])
        parts = (x[rows].unflatten(0, (last - first, lengths[first])).transpose(1, 2) for x in (q, k, v))
        out[rows] = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(0, 1)
        first = last
    return out


class Official:
    """The official model, optimizer and pipeline for a shape; on CUDA in bfloat16, as it trains."""

    def __init__(self, checkout: str, shape: dict, device: str = "cpu"):
        sys.path.insert(0, checkout)
        from diffusers.models.embeddings import get_2d_rotary_pos_embed

        stand_in = types.ModuleType("flash_attn")  # after diffusers, which looks for the real one
        stand_in.flash_attn_varlen_func = equal_length_attention
        sys.modules["flash_attn"] = stand_in
        from pixelflow.model import PixelFlowModel
        from pixelflow.pipeline_pixelflow import PixelFlowPipeline
        from pixelflow.scheduling_pixelflow import PixelFlowScheduler

        torch.manual_seed(0)
        self.shape, self.rotary, self.device = shape, get_2d_rotary_pos_embed, torch.device(device)
        sizes = dict(num_attention_heads=shape["num_heads"], attention_head_dim=shape["head_dim"])
        sizes |= {name: shape[name] for name in ("depth", "patch_size", "num_classes")}
        with contextlib.redirect_stdout(sys.stderr):
            self.model = PixelFlowModel(in_channels=3, out_channels=3, **sizes).to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.0)
        scheduler = PixelFlowScheduler(num_train_timesteps=1000, num_stages=shape["num_stages"])
        self.pipeline = PixelFlowPipeline(scheduler, self.average)
        self.batch = {
            name: x.to(self.device) if isinstance(x, torch.Tensor) else x
            for name, x in self.make_batch().items()
        }

    def make_batch(self) -> dict:
        """Return a packed batch as the official loader provides it, finest stage first."""
        s, generator = self.shape, torch.Generator().manual_seed(0)
        each = s["batch_size"] // s["num_stages"]
        lengths, rotary = [], []
        for stage in range(s["num_stages"]):
            side = s["resolution"] // 2**stage // s["patch_size"]
            table = self.rotary(
                embed_dim=s["head_dim"],
                crops_coords=((0, 0), (side, side)),
                grid_size=(side, side),
                output_type="pt",
            )
            lengths += [side * side] * each
            rotary += [torch.stack(table, -1).float()] * each
        tokens = (sum(lengths), 3 * s["patch_size"] ** 2)
        return dict(
            hidden_states=torch.randn(tokens, generator=generator),
            target=torch.randn(tokens, generator=generator),
            class_labels=torch.arange(s["batch_size"]) % s["num_classes"],
            timestep=torch.rand(s["batch_size"], generator=generator) * 999,
            latent_size=torch.tensor([int(n**0.5) for n in lengths], dtype=torch.int32),
            pos_embed=torch.cat(rotary),
            cu_seqlens_q=torch.cumsum(torch.tensor([0, *lengths]), 0).to(torch.int32),
            seqlen_list_q=lengths,
        )

    def train(self) -> float:
        """Run one step of the official train.py: loss per image, backward, clip, AdamW, average."""
        self.model.train()
        inputs = {name: x for name, x in self.batch.items() if name != "target"}
        self.optimizer.zero_grad()
        with self.precision():
            found = self.model(encoder_hidden_states=None, **inputs)
        error = (found.float() - self.batch["target"]) ** 2
        loss = torch.stack([x.mean() for x in torch.split(error, inputs["seqlen_list_q"])]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
            for ours, theirs in pairs:
                ours.mul_(0.9999).add_(theirs.data, alpha=1 - 0.9999)
        return loss.item()

    def precision(self):
        """Return the context in which the network runs."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def sample(self):
        """Run one call of the official pipeline."""
        s = self.shape
        self.average.eval()
        with self.precision():
            return self.pipeline(
                [i % s["num_classes"] for i in range(s["num_samples"])],
                s["resolution"],
                s["resolution"],
                num_inference_steps=s["num_steps"],
                guidance_scale=s["guidance_scale"],
                device=self.device,
            )

    def product(self, m: int, k: int, n: int):
        """Multiply matrices [m, k] and [k, n], made before by `prepare`."""
        return self._factors[0] @ self._factors[1]

    def prepare(self, task: str, sizes: list[int]) -> None:
        """Make what a task needs and its time must not contain."""
        if task == "product":
            m, k, n = sizes
            self._factors = [torch.randn(shape, device=self.device) for shape in ((m, k), (k, n))]


def main() -> None:
    """Answer tasks until stdin closes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", required=True)
    parser.add_argument("--shape", required=True, help="JSON")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    official = Official(args.checkout, json.loads(args.shape), args.device)
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        task, sizes = line.split()[0], [int(x) for x in line.split()[1:]]
        official.prepare(task, sizes)
        begin = time.perf_counter()
        getattr(official, task)(*sizes)
        if args.device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


if __name__ == "__main__":
    main()
