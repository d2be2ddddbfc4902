// SPDX-License-Identifier: GPL-2.0-only
/*
 * Pairs of ports, made and removed through debugfs: see README.md.
 */
#include <linux/debugfs.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/rtnetlink.h>
#include "testnic.h"

struct pair {
	struct list_head node;
	struct platform_device *bus;	/* so that the ports are devices on a bus */
	struct net_device *dev[2];
};

static LIST_HEAD(pairs);
static DEFINE_MUTEX(pairs_lock);
static struct dentry *root;

DEFINE_SHOW_ATTRIBUTE(tn_stats);
DEFINE_SHOW_ATTRIBUTE(tn_clear);
DEFINE_SHOW_ATTRIBUTE(tn_associations);
DEFINE_SHOW_ATTRIBUTE(tn_policies);

static void show_port(struct tn_port *port)
{
	port->dir = debugfs_create_dir(port->name, root);
	debugfs_create_bool("leak", 0644, port->dir, &port->leak);
	debugfs_create_file("stats", 0444, port->dir, port, &tn_stats_fops);
	debugfs_create_file("clear", 0444, port->dir, port, &tn_clear_fops);
	debugfs_create_file("associations", 0444, port->dir, port, &tn_associations_fops);
	debugfs_create_file("policies", 0444, port->dir, port, &tn_policies_fops);
}

static bool name_taken(const char *name)
{
	struct pair *pair;
	int i;

	list_for_each_entry(pair, &pairs, node)
		for (i = 0; i < 2; i++)
			if (!strcmp(((struct tn_port *)netdev_priv(pair->dev[i]))->name, name))
				return true;
	/* these are files of the folder itself */
	return !strcmp(name, "new") || !strcmp(name, "remove");
}

static int make_ports(struct pair *pair, const char *names[2])
{
	struct tn_port *port[2];
	int i, err;

	for (i = 0; i < 2; i++) {
		pair->dev[i] = tn_port_alloc(names[i], &pair->bus->dev, i);
		if (!pair->dev[i]) {
			err = -ENOMEM;
			goto free;
		}
		port[i] = netdev_priv(pair->dev[i]);
	}
	port[0]->peer = port[1];
	port[1]->peer = port[0];
	err = register_netdev(pair->dev[0]);
	if (err)
		goto free;
	err = register_netdev(pair->dev[1]);
	if (err) {
		unregister_netdev(pair->dev[0]);
		goto free;
	}
	show_port(port[0]);
	show_port(port[1]);
	return 0;
free:
	for (i = 0; i < 2; i++)
		if (pair->dev[i])
			tn_port_free(pair->dev[i]);
	return err;
}

static int make_pair(const char *names[2])
{
	struct pair *pair;
	int err;

	if (!dev_valid_name(names[0]) || !dev_valid_name(names[1]) || strchr(names[0], '%') ||
	    strchr(names[1], '%') || !strcmp(names[0], names[1]))
		return -EINVAL;
	if (name_taken(names[0]) || name_taken(names[1]))
		return -EEXIST;
	pair = kzalloc(sizeof(*pair), GFP_KERNEL);
	if (!pair)
		return -ENOMEM;
	pair->bus = platform_device_register_simple(KBUILD_MODNAME, PLATFORM_DEVID_AUTO, NULL, 0);
	if (IS_ERR(pair->bus)) {
		err = PTR_ERR(pair->bus);
		goto no_bus;
	}
	err = make_ports(pair, names);
	if (err)
		goto no_ports;
	list_add_tail(&pair->node, &pairs);
	return 0;
no_ports:
	platform_device_unregister(pair->bus);
no_bus:
	kfree(pair);
	return err;
}

/* Both ports go at once, so neither ever sends to a peer that is freed. */
static void remove_pair(struct pair *pair)
{
	LIST_HEAD(leaving);
	int i;

	list_del(&pair->node);
	for (i = 0; i < 2; i++)
		debugfs_remove_recursive(((struct tn_port *)netdev_priv(pair->dev[i]))->dir);
	rtnl_lock();
	for (i = 0; i < 2; i++)
		unregister_netdevice_queue(pair->dev[i], &leaving);
	unregister_netdevice_many(&leaving);
	rtnl_unlock();
	for (i = 0; i < 2; i++)
		tn_port_free(pair->dev[i]);
	platform_device_unregister(pair->bus);
	kfree(pair);
}

static int remove_by_name(const char *name)
{
	struct pair *pair;
	int i;

	list_for_each_entry(pair, &pairs, node)
		for (i = 0; i < 2; i++)
			if (!strcmp(((struct tn_port *)netdev_priv(pair->dev[i]))->name, name)) {
				remove_pair(pair);
				return 0;
			}
	return -ENODEV;
}

/* Up to @max words of what is written, in @line; their number, or an error. */
static int read_words(const char __user *from, size_t count, char *line, size_t size,
		      const char *words[], int max)
{
	char *rest = line, *word;
	int n = 0;

	if (count >= size)
		return -EINVAL;
	if (copy_from_user(line, from, count))
		return -EFAULT;
	line[count] = '\0';
	while ((word = strsep(&rest, " \t\n"))) {
		if (!*word)
			continue;
		if (n == max)
			return -EINVAL;
		words[n++] = word;
	}
	return n;
}

static ssize_t new_write(struct file *file, const char __user *from, size_t count, loff_t *pos)
{
	char line[3 * IFNAMSIZ];
	const char *names[2];
	int err;

	err = read_words(from, count, line, sizeof(line), names, 2);
	if (err < 0)
		return err;
	if (err != 2)
		return -EINVAL;
	mutex_lock(&pairs_lock);
	err = make_pair(names);
	mutex_unlock(&pairs_lock);
	return err ? err : count;
}

static ssize_t remove_write(struct file *file, const char __user *from, size_t count, loff_t *pos)
{
	char line[3 * IFNAMSIZ];
	const char *names[1];
	int err;

	err = read_words(from, count, line, sizeof(line), names, 1);
	if (err < 0)
		return err;
	if (err != 1)
		return -EINVAL;
	mutex_lock(&pairs_lock);
	err = remove_by_name(names[0]);
	mutex_unlock(&pairs_lock);
	return err ? err : count;
}

static const struct file_operations new_fops = {
	.owner	= THIS_MODULE,
	.write	= new_write,
};

static const struct file_operations remove_fops = {
	.owner	= THIS_MODULE,
	.write	= remove_write,
};

static int __init testnic_init(void)
{
	int err = tn_offload_init();

	if (err)
		return err;
	root = debugfs_create_dir(KBUILD_MODNAME, NULL);
	debugfs_create_file("new", 0200, root, NULL, &new_fops);
	debugfs_create_file("remove", 0200, root, NULL, &remove_fops);
	return 0;
}

static void __exit testnic_exit(void)
{
	struct pair *pair, *next;

	mutex_lock(&pairs_lock);
	list_for_each_entry_safe(pair, next, &pairs, node)
		remove_pair(pair);
	mutex_unlock(&pairs_lock);
	debugfs_remove_recursive(root);
	tn_offload_exit();
}

module_init(testnic_init);
module_exit(testnic_exit);
MODULE_DESCRIPTION("A NIC without hardware that does XFRM packet offload, for tests");
MODULE_LICENSE("GPL");
