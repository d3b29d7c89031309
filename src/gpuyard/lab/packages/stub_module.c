// SPDX-License-Identifier: MIT OR GPL-2.0-only
// A kernel module under the name of NVIDIA's driver that drives nothing. What is real about it is what the kernel does
// with a module: it is built for one kernel, counted while its devices are open, and gone after a reboot.
// Not under the licence of the rest: the kernel lends class_create() to modules that say one of these.

#include <linux/compiler.h>
#include <linux/device.h>
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/version.h>

#define MAJOR_NUMBER 195 // the driver's own, as in the kernel's Documentation/admin-guide/devices.txt
#define CONTROL_MINOR 255
#define MAX_GPUS 16

static unsigned int gpus = 1;
module_param(gpus, uint, 0444);
MODULE_PARM_DESC(gpus, "How many device files of GPUs there are");

static struct class *gpu_class;
static struct proc_dir_entry *folder;

static const struct file_operations device = {
	.owner = THIS_MODULE, // an open file counts as a use: this is what refuses to unload
	.llseek = noop_llseek,
};

static int version_show(struct seq_file *file, void *unused)
{
	seq_printf(file, "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  %s  Release Build  (gpuyard@lab)\n",
		   DRIVER_VERSION);
	seq_printf(file, "GCC version:  %s\n", CONFIG_CC_VERSION_TEXT);
	return 0;
}

static int add(unsigned int minor, const char *name, unsigned int number)
{
	return PTR_ERR_OR_ZERO(device_create(gpu_class, NULL, MKDEV(MAJOR_NUMBER, minor), NULL, name, number));
}

static void remove_all(void)
{
	unsigned int minor;

	device_destroy(gpu_class, MKDEV(MAJOR_NUMBER, CONTROL_MINOR));
	for (minor = 0; minor < gpus; minor++)
		device_destroy(gpu_class, MKDEV(MAJOR_NUMBER, minor));
	if (folder)
		proc_remove(folder);
	if (!IS_ERR_OR_NULL(gpu_class))
		class_destroy(gpu_class);
	unregister_chrdev(MAJOR_NUMBER, "nvidia");
}

static int __init stub_init(void)
{
	unsigned int minor;
	int error;

	if (gpus > MAX_GPUS)
		return -EINVAL;
	error = register_chrdev(MAJOR_NUMBER, "nvidia", &device);
	if (error)
		return error;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	gpu_class = class_create("nvidia");
#else
	gpu_class = class_create(THIS_MODULE, "nvidia");
#endif
	if (IS_ERR(gpu_class)) {
		unregister_chrdev(MAJOR_NUMBER, "nvidia");
		return PTR_ERR(gpu_class);
	}
	folder = proc_mkdir("driver/nvidia", NULL);
	error = folder && proc_create_single("version", 0444, folder, version_show) ? 0 : -ENOMEM;
	for (minor = 0; !error && minor < gpus; minor++)
		error = add(minor, "nvidia%u", minor);
	if (!error)
		error = add(CONTROL_MINOR, "nvidiactl", 0);
	if (error) {
		remove_all();
		return error;
	}
	pr_info("NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  %s (simulated)\n", DRIVER_VERSION);
	return 0;
}

static void __exit stub_exit(void)
{
	remove_all();
}

module_init(stub_init);
module_exit(stub_exit);

MODULE_DESCRIPTION("Stands in for NVIDIA's kernel module; drives nothing");
MODULE_LICENSE("Dual MIT/GPL");
MODULE_VERSION(DRIVER_VERSION);
