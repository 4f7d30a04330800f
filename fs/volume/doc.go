// Package volume is the encrypted tree without FUSE: a ciphertext directory
// with its kmsfs.json, seen as plaintext nodes.
//
// [Init] makes a volume, [Unlock] opens its volume key, [Open] gives the tree.
// A [Node] is a file, directory or link as the kernel knows it, by a number that
// is never used twice; a [Handle] is an open file, a [Dir] an open directory.
// [OpenFile] reads one ciphertext file with no volume around it.
//
// Promises, kept by the rules of FORMAT.md, "What is on the disk when the power
// fails":
//
//  1. What fsync or [Volume.Close] has answered for is there after a power cut;
//     what closing a file has answered for is there after a SIGKILL.
//  2. No interruption makes unreadable what was confirmed: it reads as its old
//     or its new content, never as a mix, never as other bytes.
//  3. Bytes that were not authenticated are never returned, and no error is
//     swallowed: it reaches the caller and the log.
//  4. A full disk, a failing disk, a refusal by the key service: the file keeps
//     what it had.
//
// All syscalls on the ciphertext tree are in disk.go, relative to descriptors of
// directories, and never follow a symlink.
//
// Locks, in this order: Volume.tree, Node.openMu, file.mu, Node.lostMu,
// Node.dirMu, settler.mu, Volume.mu, Volume.fdMu; under doubts.mu no other lock
// is taken. No call to a key service is made under any of them. A call that finds
// no descriptor closes idle ones (descriptors.go): it only tries the locks of
// other files.
package volume
