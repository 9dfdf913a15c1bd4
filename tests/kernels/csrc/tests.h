#pragma once

void test_vector();
void test_products();
void test_rows();
void test_recurrence();
void test_convolution();
void test_attention();
void test_block();
void test_blocks();
void test_decode();
void test_interface();
void test_tiles();
void test_threads();
void test_own_team();

// Set and return the number of threads of the kernels.
void use_threads(int count);
int threads_in_use();
