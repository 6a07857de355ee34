from tests.budget import A_FILE, A_TEST, IMPORTS, IN_ALL, faults


def test_a_test_a_file_and_the_suite_have_limits_that_stretch():
    slow = [("tests/a.py::test_b[c]", A_TEST + IMPORTS + 1)]
    assert [fault.split(" took ")[0] for fault in faults(slow, 1.0)] == ["tests/a.py::test_b[c]"]
    assert not faults(slow, 2.0)
    many = [(f"tests/a.py::test_{i}", 1.0) for i in range(int(A_FILE + IMPORTS) + 1)]
    assert [fault.split(" took ")[0] for fault in faults(many, 1.0)] == ["tests/a.py"]
    spread = [(f"tests/{i}.py::test", 1.0) for i in range(int(IN_ALL) + 1)]
    assert [fault.split(" took ")[0] for fault in faults(spread, 1.0)] == ["the suite"]


def test_launches_have_limits_of_their_own():
    assert not faults([("tests/distributed/test_sharded.py::test_a[x]", 40.0)], 1.0)
    assert faults([("tests/distributed/test_sharded.py::test_a[x]", 60.0)], 1.0)
