"""Inspections of implementations that are in memory."""

from fault_injection import Faulty

from fpxbench.diagnosis.blackbox.inspection import InspectRequest
from fpxbench.diagnosis.blackbox.inspector import inspect_implementation


def inspected(implementation, scheme, *, n=40, k=104, m=33, seed=3, device="cpu", **more):
    request = InspectRequest(subject="here", scheme=scheme, n=n, k=k, m=m, seed=seed, device=device, **more)
    return inspect_implementation(implementation, request)


def experiment(inspection, name):
    return next(one for one in inspection.experiments if one.name == name)


class Decoding(Faulty):
    """Multiplies by what the oracle decodes, whatever the layout."""

    def matmul(self, x, weight):
        return self.multiply(x, weight.dequantize())
