//go:build linux && !portable

package volume

import (
	"context"
	"errors"
	"sync"

	"golang.org/x/sys/unix"
)

// sweep is what is done with all files of a tree.
type sweep struct {
	file   func(context.Context, *Node) // called for several at the same time
	failed func(at string, err error)   // told of an entry that cannot be looked up
}

// eachFile calls s.file for each regular file below a node, or the node itself, atOnce at the same
// time: at the root also for those that are open and have no name.
func (ns *namespace) eachFile(ctx context.Context, n *Node, atOnce int, s sweep) error {
	jobs := make(chan *Node)
	var wg sync.WaitGroup
	for range max(1, atOnce) {
		wg.Go(func() {
			for n := range jobs {
				s.file(ctx, n)
				ns.v.Forget(n.id, 1)
			}
		})
	}
	var err error
	if n.IsDir() {
		err = ns.filesBelow(ctx, n, jobs, s)
	} else if ns.v.nodes.again(n) {
		jobs <- n
	}
	if n == ns.v.root {
		for _, f := range ns.v.nodes.files() {
			if n := f.n; err == nil && !n.named() && ns.v.nodes.again(n) {
				jobs <- n
			}
		}
	}
	close(jobs)
	wg.Wait()
	return err
}

// filesBelow sends the files below a directory, each with a lookup.
func (ns *namespace) filesBelow(ctx context.Context, n *Node, jobs chan<- *Node, s sweep) error {
	d, err := n.OpenDir()
	if err != nil {
		return err
	}
	defer d.Close()
	var fault error
	err = d.Next(func(e Entry) bool {
		if e.Name == "." || e.Name == ".." {
			return ctx.Err() == nil
		}
		c, _, _, err := d.Lookup(ctx, e)
		switch {
		case errors.Is(err, unix.ENOENT):
		case err != nil:
			s.failed(n.where()+"/"+e.cname, err)
		case c.IsFile():
			select {
			case jobs <- c:
			case <-ctx.Done():
				ns.v.Forget(c.id, 1)
			}
		default:
			if c.IsDir() {
				fault = errors.Join(fault, ns.filesBelow(ctx, c, jobs, s))
			}
			ns.v.Forget(c.id, 1)
		}
		return ctx.Err() == nil
	})
	return errors.Join(err, fault, ctx.Err())
}
