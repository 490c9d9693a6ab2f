"""bench/gpu/clock.py on a simulated GPU: the host's time is not in the figures."""

from bench.gpu.clock import milliseconds


class Simulated:
    """A stream that runs what the host issued, in order; the host's clock moves when the host works."""

    def __init__(self):
        self.host = 0.0
        self.stream = 0.0

    def now(self):
        return self.host

    def event(self):
        self.host += 1e-6
        self.stream = max(self.stream, self.host)
        return self.stream

    def between(self, first, second):
        return 1e3 * (second - first)

    def hold(self, seconds):
        self.launch(0.0, seconds)

    def flush(self):
        self.launch(5e-6, 100e-6)

    def wait(self):
        self.host = max(self.host, self.stream)

    def launch(self, host, device):
        self.host += host
        self.stream = max(self.stream, self.host) + device


def test_a_slow_launcher_does_not_change_the_figure():
    for slow in (0.0, 1e-3):
        gpu = Simulated()
        found = milliseconds(
            {
                "a": lambda gpu=gpu, slow=slow: gpu.launch(20e-6 + slow, 50e-6),
                "b": lambda gpu=gpu: gpu.launch(20e-6, 2e-3),
            },
            gpu,
        )
        assert abs(found["a"] - 0.05) < 1e-9 and abs(found["b"] - 2.0) < 1e-9


def test_contenders_take_turns():
    gpu = Simulated()
    order = []

    def run(name):
        order.append(name)
        gpu.launch(10e-6, 1e-3)

    milliseconds({"a": lambda: run("a"), "b": lambda: run("b")}, gpu, budget=0.006)
    assert order[-10:] == ["a", "b"] * 5
