//go:build linux && !portable

package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// ignorePipe keeps this process alive when it writes to a pipe whose reader has gone; the
// write fails instead. Programs that it starts are not affected.
func ignorePipe() { signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE) }

// droppedFormats are events of the log in text and in JSON.
var droppedFormats = map[bool]string{
	false: "level=WARN msg=\"%d lines of the log were dropped: nobody read them\"\n",
	true:  `{"level":"WARN","msg":"%d lines of the log were dropped: nobody read them"}` + "\n"}

const (
	logQueue   = 1024            // lines that wait for the reader of a log
	logAtClose = 2 * time.Second // how long they are waited for at the end
)

// pipeLog is the log of a daemon in the foreground. The reader of its stderr may go, or stop
// reading, as journald and docker do when they restart: that must neither end nor stop the
// daemon. So lines wait in a queue, and are dropped and counted when it is full.
type pipeLog struct {
	lines   chan func() // each writes one
	w       io.Writer
	json    bool // set before the first line
	dropped atomic.Int64
	quit    chan struct{} // closed by Close
	done    chan struct{} // closed when the queue is empty after that
	once    sync.Once
}

func newPipeLog(w io.Writer) *pipeLog {
	l := &pipeLog{w: w, lines: make(chan func(), logQueue), quit: make(chan struct{}), done: make(chan struct{})}
	go l.run()
	return l
}

// run writes the lines, in its own goroutine: a reader that is slow keeps no request waiting.
func (l *pipeLog) run() {
	defer close(l.done)
	put := func(line func()) {
		line()
		if n := l.dropped.Swap(0); n > 0 {
			fmt.Fprintf(l.w, droppedFormats[l.json], n)
		}
	}
	for {
		select {
		case line := <-l.lines:
			put(line)
		case <-l.quit:
			for len(l.lines) > 0 {
				put(<-l.lines)
			}
			return
		}
	}
}

// Write implements [io.Writer]. It never waits, and never fails.
func (l *pipeLog) Write(b []byte) (int, error) {
	b = bytes.Clone(b)
	l.put(func() { l.w.Write(b) }) // a failure cannot be told: this is the log
	return len(b), nil
}

// put queues what writes one line. It never waits.
func (l *pipeLog) put(line func()) {
	select {
	case l.lines <- line:
	default:
		l.dropped.Add(1)
	}
}

// Close waits a little for the reader. Lines that are written after it are lost.
func (l *pipeLog) Close() error {
	l.once.Do(func() { close(l.quit) })
	select {
	case <-l.done:
	case <-time.After(logAtClose):
	}
	return nil
}

// maxLog bounds a log file; one older file is kept beside it.
const maxLog = 1 << 20

// logFile is a log of bounded size.
type logFile struct {
	path string

	mu     sync.Mutex
	f      *os.File
	size   int64
	stderr bool // it stands for stderr too
}

func openLog(path string) (*logFile, error) {
	l := &logFile{path: path}
	return l, l.open()
}

func (l *logFile) open() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	l.f, l.size = f, st.Size()
	return nil
}

// Write implements [io.Writer].
func (l *logFile) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size+int64(len(b)) > maxLog {
		old := l.f
		if err := os.Rename(l.path, l.path+".1"); err == nil {
			if err := l.open(); err == nil {
				if l.stderr {
					unix.Dup3(int(l.f.Fd()), 2, 0)
				}
				old.Close()
			}
		}
	}
	n, err := l.f.Write(b)
	l.size += int64(n)
	return n, err
}

// Close closes the log.
func (l *logFile) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.f.Close()
}
