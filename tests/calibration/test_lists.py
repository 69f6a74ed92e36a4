"""A denoiser whose arguments are lists with an entry an image, of unequal lengths."""

import pytest
import torch
from torch import Tensor, nn

from quantempo.calibration.dataset import MemorySet
from quantempo.engines.select import attach
from quantempo.errors import QuantempoError
from quantempo.pipeline.quantize import quantize
from tests.packed import recipe
from tests.tiny import noise
from tests.uses import ENGINES_HERE


class Listed(nn.ModuleList):
    def forward(self, x: list[Tensor], t: Tensor, captions: list[Tensor]) -> tuple[list[Tensor]]:
        first, text, mid, last, *_ = self
        tokens = text(torch.cat(captions)).split([*map(len, captions)])
        y = first(torch.stack(x)) + torch.stack([own.mean(0) for own in tokens])[:, None]
        return ([*last(mid(y + t.view(-1, 1, 1)).sin())],)


def call(lengths: tuple[int, ...], t: float | list[float] = 0.5) -> dict:
    x, captions = noise(len(lengths), 8, 8), [noise(n, 8, seed=n) for n in lengths]
    return {"x": [*x], "t": torch.as_tensor(t).expand(len(x)), "captions": captions}


@pytest.mark.parametrize("engine", ENGINES_HERE)
def test_each_entry_of_a_list_is_that_of_an_image(engine: str) -> None:
    torch.manual_seed(0)
    net = Listed(nn.Linear(8, 8) for _ in range(4))
    calls = [call((3, 8, 3, 1), 0.2), call((8, 3), 0.5), call((1, 8, 8), 0.8)]
    data = MemorySet.of_calls(net, calls)
    wanted = torch.stack([y for given in calls for y in net(**given)[0]]).flatten(1)
    found = torch.cat([data.replay(net, batch) for batch in data.batches()]).flatten(1)
    assert len(data.pieces) == 3 and torch.cdist(found, wanted).amin(1).max() < 1e-5
    quantize(net, data, recipe().override("rounding", name="gptq", bias=True)).install(net.eval())
    attach(net, engine)
    for several in (call((3, 3, 3), [0.2, 0.5, 0.8]), mixed := call((8, 1, 8, 3))):
        alone = [net([x], t[None], [c])[0][0] for x, t, c in zip(*several.values(), strict=True)]
        torch.testing.assert_close(net(*several.values())[0], alone, atol=1e-4, rtol=0)
    mixed["captions"][1][0] = torch.nan
    assert [bool(y.isnan().all()) for y in net(**mixed)[0]] == [False, True, False, False]
    with pytest.raises(QuantempoError, match="unequal time-steps"):
        net(**{**mixed, "t": torch.arange(4.0)})
