# The CUDA kernels' own headers compiled as C++ under csrc/host's shim: a pybind11 module for
# pytest, and the same code under AddressSanitizer and UBSan as a CTest.

find_package(Python3 REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(
  COMMAND ${Python3_EXECUTABLE} -m pybind11 --cmakedir
  OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
set(PYBIND11_FINDPYTHON NEW)
set(Python_EXECUTABLE ${Python3_EXECUTABLE})
find_package(pybind11 REQUIRED CONFIG)

pybind11_add_module(fusednorm_host MODULE NO_EXTRAS csrc/host/module.cpp csrc/host/cuda_shim.cpp)

enable_testing()
add_executable(host_selftest csrc/host/selftest.cpp csrc/host/cuda_shim.cpp)
foreach(target fusednorm_host host_selftest)
  target_include_directories(${target} PRIVATE csrc csrc/host)
  target_compile_definitions(${target} PRIVATE FUSEDNORM_HOST)
endforeach()
set(sanitize -fsanitize=address,undefined)
target_compile_options(
  host_selftest PRIVATE ${sanitize} -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g)
target_link_options(host_selftest PRIVATE ${sanitize})
add_test(NAME host_selftest COMMAND host_selftest)
set_tests_properties(
  host_selftest PROPERTIES TIMEOUT 300 ENVIRONMENT
                           "ASAN_OPTIONS=detect_stack_use_after_return=0;UBSAN_OPTIONS=print_stacktrace=1")
