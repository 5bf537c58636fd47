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

`timm.create_model("hf-hub:{repo}", pretrained=True)` loads it from the Hub
once it is published there, `"local-dir:FOLDER"` from a copy of this folder; both need `import poolskip_zoo` too.
Preprocessing is timm's, by `timm.data.resolve_model_data_config(model)`. HF transformers takes the folder too, after
the same import, by `AutoModelForImageClassification.from_pretrained(FOLDER, dtype=torch.float32)`; without `dtype` it
computes in the file's float16. To ONNX, with any batch size:

```python
sizes = ({{0: torch.export.Dim.DYNAMIC}},)
program = torch.onnx.export(model, (torch.rand(2, {shape}),), dynamic_shapes=sizes, dynamo=True)
program.save("{name}.onnx")
```"""
TRAIN_FIRST = """\
Its weights are not kept, for their size: {size:.0f} MB. The recipe below makes them again, `poolskip train` in
`runs/{name}-s{seed}`, and `poolskip hub add` makes a checkpoint of such a run."""
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

Measured on the {split} images by `poolskip validate {measured} --data-dir DATA`. Costs are of one {size} image.

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
