// Package volume is the encrypted tree without FUSE: a ciphertext directory
// with its kmsfs.json, seen as plaintext nodes.
//
// [Init] makes a volume. [Find] finds one, [Found.Unlock] opens its volume key, and [Unlocked.Open]
// gives the tree. A [Node] is a file, directory or link as the kernel knows it, by a number that is
// never used twice; a [Handle] is an open file, a [Dir] an open directory. [OpenLone] reads one
// ciphertext file with no volume around it.
//
// Promises, kept by the rules of FORMAT.md, "The disk when the power
// fails":
//
//  1. Data that fsync or [Volume.Close] has confirmed is there after a power cut;
//     data of a closed file is there after a SIGKILL.
//  2. No interruption makes confirmed data unreadable: each page of 4 KiB reads as its old
//     or its new content, never as a mix, never as other bytes.
//  3. Bytes that were not authenticated are never returned, but for the zeros of holes. An error
//     that concerns a program's data reaches the program and the log.
//  4. On a full disk, a failing disk or a refusal by the key service, a file keeps its confirmed
//     content.
//
// Package disk below makes all syscalls on the ciphertext tree, relative to descriptors of
// directories, and never follows a symlink.
//
// Locks, in this order: sessions.markerMu, Volume.crossing, Node.entries (see lockDirs),
// Node.openMu, file.mu, Node.lostMu, Node.dirMu, settler.mu, Volume.mu, Volume.fdMu; under
// sessions.mu, doubts.mu and file.shownMu no other lock is taken. No call to a key service is
// made under any of them.
//
// A request waits for the disk only as long as its own calls take, and those of requests
// that it has to do with. Locks that are held across a syscall, and the requests that wait:
//
//   - Node.entries of a directory, for reading while an entry is looked up or made, for
//     writing while one is removed or renamed: a removal or a rename waits for all others in that
//     directory, and all others wait for it.
//   - Volume.crossing while an entry goes from one directory to another: other such
//     renames, as in Linux.
//   - Node.openMu while a file is opened, repaired or closed: the same for that file.
//   - file.mu while a file is read (shared), written, cut or settled: requests for its
//     content. A program's fsync does not hold it, but a sync that a write must wait for does
//     (FORMAT.md, section 4). Requests for the file's attributes do not wait at all.
//   - sessions.markerMu while the marker is replaced, and while a new session begins: the next
//     change of the marker, which no request waits for.
//   - Node.dirMu while the ID of a directory is read: requests for a name in it.
//   - Node.lostMu while a file is read of which bytes were lost.
//
// Volume.mu and Volume.fdMu, which every request takes, are held across no syscall. A call
// that finds no descriptor closes idle ones (descriptors.go): it only tries the locks of
// other files.
package volume
