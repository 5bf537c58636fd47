"""The text of model cards, with places for what `card` fills in."""

CITATION = """\
@inproceedings{sun2025beyond,
  title     = {Beyond Skip Connection: Pooling and Unpooling Design for Elimination Singularities},
  author    = {Sun, Chengkun and Pan, Jinqian and Jin, Zhuoli and Terry, Russell Stevens and Bian, Jiang and Xu, Jie},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2025},
  note      = {arXiv:2409.13154}
}"""
USE = """\
```python
import poolskip_zoo  # registers the model with timm; without it timm says "Unknown model"
import timm
import torch

model = timm.create_model("{name}", pretrained=True).eval()
logits = model(torch.rand(1, {shape}))  # (1, {classes})
```

Other ways to load it, after the same import:

- from the Hub, once it is published there: `timm.create_model("hf-hub:{repo}", pretrained=True)`;
- from a copy of this folder: the same with `"local-dir:FOLDER"`;
- in HF transformers: `AutoModelForImageClassification.from_pretrained(FOLDER, dtype=torch.float32)`; without `dtype` it
  computes in the file's float16.

`timm.data.resolve_model_data_config(model)` gives the preprocessing. To export to ONNX with any batch size:

```python
sizes = ({{0: torch.export.Dim.DYNAMIC}},)
program = torch.onnx.export(model, (torch.rand(2, {shape}),), dynamic_shapes=sizes, dynamo=True)
program.save("{name}.onnx")
```"""
TRAIN_FIRST = """\
The weights are not kept, because of their size ({size:.0f} MB). `poolskip train` with the recipe below makes them again
in `runs/{name}-s{seed}`, and `poolskip hub add` makes a checkpoint from such a run."""
FILES_SECTION = """\
## Files

`model.safetensors` (the weights), `config.json` (for {library}), `golden.safetensors` (an input and its output) and
`SHA256SUMS`. `poolskip hub verify {name}` checks them all.

"""
BODY = """\
# {name}

{what}

## Use

{use}

## Results

{results}

Measured on the {split} images with `poolskip validate {measured} --data-dir DATA`. Costs are for one {size} image.

## Training

Data: {data}. Terms of the data: {terms}.
One run, seed {seed}, {hours:.2f} hours on {hardware}{speed}.
{pair}
`poolskip train {recipe_name} --data-dir DATA --set seed={seed}` repeats it:

```yaml
{recipe}
```

## Limits

{limits}

{files}## Citation

```bibtex
{citation}
```
"""
