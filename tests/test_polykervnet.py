"""Models turned into PolyKervNets and back, and the claims about their depth."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import chainzrule_kernels as ck
from image_classification.resnet import ResNet

KERNELS = {"rpkn": ck.nn.RPKNConv2d, "pkn": ck.nn.PKNConv2d, "kerv": ck.nn.KervConv2d}
ACTIVATIONS = {"react": ck.nn.ReactPKN, "act": ck.nn.ActPKN}


def resnet(depth: int = 18) -> nn.Module:
    torch.manual_seed(0)
    return ResNet(depth, 5, width=4, stem="imagenet").double()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("depth", [18, 50])
def test_convolutions_become_kernels_and_relu_goes(kernel, depth):
    model = resnet(depth)
    converted = ck.to_polykervnet(model, kernel)
    assert count(converted, KERNELS[kernel]) == count(model, nn.Conv2d) == {18: 20, 50: 53}[depth]
    assert count(converted, nn.Conv2d) == count(converted, nn.ReLU) == count(converted, nn.MaxPool2d) == 0
    assert count(converted, nn.Identity) == count(model, nn.ReLU) + count(model, nn.Identity)
    assert count(converted, nn.AvgPool2d) == 1
    assert count(converted, nn.BatchNorm2d) == count(model, nn.BatchNorm2d)
    state = converted.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(isinstance(module, tuple(KERNELS.values())) for module in model.modules())


@pytest.mark.parametrize("kernel", ACTIVATIONS)
def test_activations_become_polynomials(kernel):
    model = resnet()
    converted = ck.to_polykervnet(model, kernel)
    assert count(converted, ACTIVATIONS[kernel]) == count(model, nn.ReLU) == 9
    assert count(converted, nn.Conv2d) == count(model, nn.Conv2d)
    assert count(converted, nn.AvgPool2d) == 1
    added = set(converted.state_dict()) - set(model.state_dict())
    assert len(added) == 9 * len(list(ACTIVATIONS[kernel]().parameters()))
    assert all(value.dtype == torch.float64 for value in converted.parameters())


def test_converted_resnet_is_the_one_written_with_powers():
    class Squared(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return 0.009 * (self.conv(x) + 0.47) ** 2

    model = resnet()
    expected = copy.deepcopy(model)
    for module in list(expected.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Conv2d:
                setattr(module, name, Squared(child))
            elif type(child) is nn.ReLU:
                setattr(module, name, nn.Identity())
            elif type(child) is nn.MaxPool2d:
                setattr(module, name, nn.AvgPool2d(3, 2, 1))
    torch.testing.assert_close(ck.to_polykervnet(model)(images()), expected(images()))


@pytest.mark.parametrize("kernel", ["rpkn", "react"])
def test_conversion_can_be_undone(kernel):
    model = resnet().eval()
    converted = ck.to_polykervnet(model, kernel)
    for twin in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        back = ck.from_polykervnet(twin)
        assert repr(back) == repr(model)
        assert list(back.state_dict()) == list(model.state_dict())
        assert torch.equal(back(images()), model(images()))
        with pytest.raises(ValueError, match="expected one that to_polykervnet has converted"):
            ck.from_polykervnet(back)


def test_undone_model_has_what_was_learned():
    converted = ck.to_polykervnet(resnet())
    with torch.no_grad():
        converted.conv1.weight.fill_(7.0)
    converted = converted.float().train(False)
    back = ck.from_polykervnet(converted, inplace=True)
    assert back is converted
    assert back.conv1.weight.dtype == torch.float32
    assert (back.conv1.weight == 7).all()
    assert not any(module.training for module in back.modules())


def test_inplace_keeps_the_parameters_for_the_optimizer():
    model = resnet()
    before = dict(model.named_parameters())
    assert ck.to_polykervnet(model, inplace=True) is model
    assert all(dict(model.named_parameters())[name] is value for name, value in before.items())
    model(images()).sum().backward()
    assert all(value.grad is not None for value in model.parameters())


def test_choice_of_layers():
    model = resnet()
    by_name = ck.to_polykervnet(model, layers=["layer1.0.conv1", "layer1.0.conv2"])
    assert [name for name, module in by_name.named_modules() if isinstance(module, ck.nn.RPKNConv2d)] == [
        "layer1.0.conv1",
        "layer1.0.conv2",
    ]
    assert type(by_name.layer1[0].relu) is nn.Identity
    assert type(by_name.layer1[1].relu) is nn.ReLU
    assert type(by_name.relu) is nn.ReLU
    by_function = ck.to_polykervnet(model, layers=lambda name, conv: conv.kernel_size == (3, 3))
    assert count(by_function, ck.nn.RPKNConv2d) == 16
    rows = {row.name: row for row in ck.polykervnet_report(by_name)}
    assert rows["conv1"].note == "not chosen by layers"
    assert rows["relu"].note == "the layer in front of it is a Conv2d that stays"


def test_first_layer_and_pooling_can_stay():
    converted = ck.to_polykervnet(resnet(), "rpkn", keep_first=True, pool=False, degree=3, a=0.1, learnable=False)
    assert type(converted.conv1) is nn.Conv2d
    assert type(converted.relu) is nn.ReLU
    assert type(converted.maxpool) is nn.MaxPool2d
    layer = converted.layer1[0].conv1
    assert (layer.degree, layer.log_a.requires_grad) == (3, False)
    torch.testing.assert_close(layer.a, torch.tensor(0.1, dtype=torch.float64))
    assert type(ck.to_polykervnet(resnet(), "react", keep_first=True).relu) is nn.ReLU


class Mixed(nn.Module):
    """Something of everything that cannot be replaced."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2, dilation=2), nn.Conv2d(4, 4, 1), nn.GELU()
        )
        self.transposed = nn.ConvTranspose2d(4, 4, 1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.relu = nn.ReLU()
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x):
        x = F.relu(self.transposed(self.features(x)))
        x = F.max_pool2d(self.relu(self.normed(x)).relu(), 2)
        return self.head(x.mean((2, 3)))


def test_report_says_what_stays_and_why():
    converted = ck.to_polykervnet(Mixed())
    rows = [(row.name, row.module, row.became, row.note) for row in ck.polykervnet_report(converted)]
    assert rows == [
        ("", "Mixed", None, "its forward calls relu, which cannot be replaced"),
        ("", "Mixed", None, "its forward calls max_pool2d, which cannot be replaced"),
        ("features.0", "Conv2d", "RPKNConv2d", ""),
        ("features.1", "ReLU", "Identity", ""),
        ("features.2", "MaxPool2d", None, "average pooling has no dilation"),
        ("features.3", "Conv2d", "RPKNConv2d", ""),
        ("features.4", "GELU", None, "GELU is not among the activations"),
        ("transposed", "ConvTranspose2d", None, "expected a torch.nn.Conv2d, got ConvTranspose2d"),
        (
            "normed",
            "ParametrizedConv2d",
            None,
            "expected a torch.nn.Conv2d whose weight is a parameter, got one whose weight is computed from others",
        ),
        ("relu", "ReLU", None, "the layer in front of it is a ParametrizedConv2d that stays"),
        ("head.1", "ReLU", None, "the layer in front of it is a Linear that stays"),
    ]
    assert converted(torch.randn(2, 3, 12, 12)).shape == (2, 2)
    assert "GELU is not among the activations" in str(ck.polykervnet_report(converted))
    assert type(ck.to_polykervnet(Mixed(), activations=(nn.GELU,)).features[4]) is nn.Identity


def test_a_module_in_two_places_is_replaced_by_one():
    shared = nn.ReLU()
    conv = nn.Conv2d(2, 2, 1)
    converted = ck.to_polykervnet(nn.Sequential(conv, shared, conv, shared), "react")
    assert converted[1] is converted[3]
    converted = ck.to_polykervnet(nn.Sequential(conv, shared, conv, shared), "pkn")
    assert converted[0] is converted[2]
    back = ck.from_polykervnet(converted)
    assert back[0] is back[2]
    assert back[1] is back[3]


def test_a_model_that_is_one_convolution():
    conv = nn.Conv2d(2, 3, 1)
    converted = ck.to_polykervnet(conv, inplace=True)
    assert type(converted) is ck.nn.RPKNConv2d
    assert converted.weight is conv.weight
    assert ck.from_polykervnet(converted, inplace=True) is conv


def test_activation_in_front_of_its_convolution_goes_too():
    converted = ck.to_polykervnet(nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 1)))
    assert type(converted[1]) is nn.Identity


def test_hooks_are_reported():
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    model[0].register_forward_hook(lambda module, args, output: None)
    assert ck.polykervnet_report(ck.to_polykervnet(model))[0].note == "its hooks are not taken over"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ck.to_polykervnet(3), TypeError, "model: expected a torch.nn.Module, got int"),
        (
            lambda: ck.to_polykervnet(resnet(), "spline"),
            ValueError,
            "kernel: expected one of rpkn, pkn, kerv, react, act",
        ),
        (
            lambda: ck.to_polykervnet(resnet(), layers=["conv9"]),
            ValueError,
            "layers: the model has no module named 'conv9'",
        ),
        (lambda: ck.to_polykervnet(resnet(), layers="conv1"), TypeError, "layers: expected names .* got the string"),
        (lambda: ck.to_polykervnet(resnet(), layers=3), TypeError, "layers: expected names or a function, got int"),
        (lambda: ck.to_polykervnet(resnet(), inplace=1), TypeError, "inplace: expected True or False, got int"),
        (
            lambda: ck.to_polykervnet(resnet(), activations=nn.ReLU),
            TypeError,
            "activations: expected a tuple of classes",
        ),
        (lambda: ck.to_polykervnet(resnet(), "pkn", a=1.0), TypeError, "unexpected keyword argument 'a'"),
        (lambda: ck.to_polykervnet(resnet(), degree=9), ValueError, "degree: expected 1 to 8, got 9"),
        (lambda: ck.to_polykervnet(nn.Linear(1, 1)), ValueError, "model: found no convolution to replace in a Linear"),
        (lambda: ck.to_polykervnet(nn.Linear(1, 1), "act"), ValueError, "model: found no activation to replace"),
        (
            lambda: ck.to_polykervnet(torch.compile(resnet())),
            ValueError,
            "model: expected one that torch.compile has not wrapped",
        ),
        (lambda: ck.from_polykervnet(resnet()), ValueError, "model: expected one that to_polykervnet has converted"),
        (lambda: ck.polykervnet_report(resnet()), ValueError, "model: expected one that to_polykervnet has converted"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_changed_when_the_conversion_fails():
    model = resnet()
    before = repr(model)
    with pytest.raises(ValueError, match="degree"):
        ck.to_polykervnet(model, degree=9, inplace=True)
    assert repr(model) == before


def test_an_activation_in_a_container_of_its_own_belongs_to_the_layer_in_front():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU()), nn.Flatten(), nn.Linear(4, 2), nn.Sequential(nn.ReLU())
    )
    report = {row.name: row.became for row in ck.polykervnet_report(ck.to_polykervnet(model))}
    assert report == {"0": "RPKNConv2d", "1.0": "Identity", "4.0": None}


def test_a_model_converted_in_parts_is_reported_and_undone_as_a_whole():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    x = images()[:, :, :9, :9].float()
    parts = ck.to_polykervnet(ck.to_polykervnet(model, "rpkn", layers=["0"]), "kerv")
    assert [(row.name, row.became) for row in ck.polykervnet_report(parts)] == [
        ("0", "RPKNConv2d"), ("1", "Identity"), ("2", "KervConv2d"), ("3", "Identity"), ("4", "AvgPool2d"),
    ]  # fmt: skip
    assert torch.equal(ck.from_polykervnet(parts)(x), model(x))
    # A place that was converted twice, once without and once with something in it.
    twice = ck.to_polykervnet(ck.to_polykervnet(model), "react", activations=(nn.Identity,))
    assert count(twice, ck.nn.ReactPKN) == 2
    back = ck.from_polykervnet(twice)
    assert torch.equal(back(x), model(x))
    assert count(back, nn.ReLU) == 2


def test_what_comes_back_is_where_the_model_is_now():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU()).eval()
    converted = ck.to_polykervnet(model, "react", activations=(nn.PReLU,)).double()
    back = ck.from_polykervnet(converted)
    torch.testing.assert_close(back(images()), copy.deepcopy(model).double()(images()))


def test_adaptive_max_pooling_becomes_adaptive_average_pooling():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d((2, 3)), nn.AdaptiveMaxPool2d(1, return_indices=True)
    )
    converted = ck.to_polykervnet(model)
    assert (type(converted[1]), converted[1].output_size) == (nn.AdaptiveAvgPool2d, (2, 3))
    assert ck.polykervnet_report(converted)[2].note == "average pooling returns no indices"


def test_functions_in_attributes_are_reported():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.activation = F.relu

        def forward(self, x):
            return self.activation(self.conv(x))

    row, _ = ck.polykervnet_report(ck.to_polykervnet(Net()))
    assert (row.became, row.note) == (None, "its attribute activation is the function relu, which cannot be replaced")
