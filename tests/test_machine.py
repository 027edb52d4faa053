from vmoe_routers.machine import cpu_model, machine_description, package_version


def test_machine_description():
    found = machine_description()
    assert {"CPU", "cores", "memory", "system", "Python", "torch", "vmoe_routers", "timm"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())
    assert cpu_model() in found["CPU"]


def test_a_package_that_is_not_installed_has_no_version():
    assert package_version("torch") and package_version("no-such-package") is None
